"""Small models, requests and comparisons for the tests of the rollout engine."""

import dataclasses
import random

import torch
from torch import Tensor

from infir2.model.attention import Attend, causal_attention
from infir2.model.config import ModelConfig
from infir2.model.transformer import CausalLM
from infir2.rollout.engine import Engine
from infir2.rollout.records import Completion, Request, SamplingParams

VOCAB = 320
ARCHITECTURE = ModelConfig(
    model_type="qwen2",
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    rope_theta=10_000.0,
    initializer_range=0.15,
    tie_word_embeddings=True,
    qkv_bias=True,
)
# Initialised as real models are: the larger weights above make every rounding error several times larger.
FP8_ARCHITECTURE = dataclasses.replace(
    ARCHITECTURE, hidden_size=128, intermediate_size=256, head_dim=32, num_key_value_heads=4, initializer_range=0.02
)


def make_model(config: ModelConfig = ARCHITECTURE, seed: int = 0, dtype: torch.dtype = torch.float32) -> CausalLM:
    model = CausalLM(config, dtype)
    model.init_weights(seed)
    return model


def prompts(count: int, longest: int = 60, seed: int = 0) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.choices(range(VOCAB), k=rng.randint(1, longest))) for _ in range(count)]


def mixed_requests(count: int, new: int = 16, seed: int = 0) -> list[Request]:
    """Every way of sampling, with seeds."""
    kinds = [{}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 20, "temperature": 1.3}, {"top_k": 50, "top_p": 0.7}]
    return [
        Request(prompt, SamplingParams(max_new_tokens=new, seed=i, raw_logprobs=True, **kinds[i % len(kinds)]))
        for i, prompt in enumerate(prompts(count, seed=seed))
    ]


def flat(completions: list[list[Completion]]) -> list[Completion]:
    return [completion for samples in completions for completion in samples]


def assert_same(got: list[Completion], expected: list[Completion], tolerance: float = 1e-5) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert one.finish_reason == other.finish_reason
        gap = (torch.tensor(one.logprobs) - torch.tensor(other.logprobs)).abs().max().item()
        assert gap < tolerance, f"{one.request_id}: log-probs differ by {gap:.1e}"


@torch.no_grad()
def forward_logprobs(
    model: CausalLM, prompt: tuple[int, ...], tokens: tuple[int, ...], attend: Attend = causal_attention
) -> Tensor:
    """The trainer's forward pass over one sequence: log-softmax of the logits at the generated tokens."""
    ids = torch.tensor([prompt + tokens])
    logits = model(ids, torch.arange(ids.shape[1])[None], attend)[0].float()
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(tokens)[:, None])[:, 0]


def float32_attention(q: Tensor, k: Tensor, v: Tensor, layer_index: int) -> Tensor:
    """As the paged twin computes: everything in float32, rounded once."""
    return causal_attention(q.float(), k.float(), v.float(), layer_index).to(q.dtype)


def gaps(
    model: CausalLM, requests: list[Request], completions: list[Completion], attend: Attend = causal_attention
) -> Tensor:
    """|difference| between the engine's raw log-probs and the trainer's, of every token."""
    differences = [
        forward_logprobs(model, request.prompt_ids, done.token_ids, attend) - torch.tensor(done.raw_logprobs)
        for request, done in zip(requests, completions, strict=True)
    ]
    return torch.cat(differences).abs()


def worst_gap(model: CausalLM, requests: list[Request], completions: list[Completion]) -> float:
    return gaps(model, requests, completions).max().item()


def assert_nothing_is_held(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.waiting, stats.running, stats.blocks_held) == (0, 0, 0)
    assert not engine.has_unfinished
