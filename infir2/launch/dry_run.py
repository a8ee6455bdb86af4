"""What `--dry-run` prints: the resolved recipe, the model's size and an estimate of the memory of one process."""

from dataclasses import dataclass

import torch

from infir2.config import RlConfig, TrainingConfig, TrainSection, to_toml
from infir2.fp8.linear import Fp8Linear
from infir2.kernels.logit_chunks import CHUNK_LOGITS, HELD_CHUNKS
from infir2.launch.kept_activations import kept_by_layers
from infir2.launch.model import convert_as
from infir2.model.config import ModelConfig
from infir2.model.transformer import CausalLM

GIB = 2.0**30
_BACKWARD = "one layer's backward pass"


@dataclass(frozen=True)
class Workload:
    """How much a recipe computes."""

    steps: int
    """0: not known without the data."""
    tokens: int
    """Tokens read in all steps, over all processes."""
    micro_batch_tokens: int
    """Most tokens in one forward pass of one process."""
    at_most: bool = False
    """Whether so many tokens are read only where every sequence is as long as it may be."""


def describe_run(config: TrainingConfig, architecture: ModelConfig, world_size: int, work: Workload) -> str:
    """Text for people."""
    with torch.device("meta"):
        model = CausalLM(architecture, getattr(torch, config.model.dtype))
    report = convert_as(model, config.fp8)
    memory = estimate_memory(config, model, world_size, work.micro_batch_tokens)
    bound = "at most " if work.at_most else ""
    tokens = f"{bound}{work.tokens:,} in {work.steps:,} steps of {config.train.global_batch} sequences"
    lines = [
        to_toml(config),
        f"parameters: {architecture.num_parameters():,}",
        f"tokens: {tokens if work.steps else 'not known without the data'}",
        str(report),
        f"memory of one of {world_size} process(es), estimated:",
        *(f"  {name:<52} {size / GIB:8.2f} GiB" for name, size in (memory.lasting | memory.passing).items()),
        f"  {'gradients (float32)':<52} {memory.gradients / GIB:8.2f} GiB",
        f"  {memory.together:<52} {memory.peak / GIB:8.2f} GiB",
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device by what they hold."""

    lasting: dict[str, float]
    """What is there all the time."""
    passing: dict[str, float]
    """What a forward and backward pass needs."""
    gradients: float
    accumulates: bool
    """Whether a step has several micro-batches: all but the first meet the gradients of those before."""

    @property
    def peak(self) -> float:
        lasting, passing = sum(self.lasting.values()), sum(self.passing.values())
        if self.accumulates:
            return lasting + passing + self.gradients
        return lasting + max(passing, self.gradients + self.passing[_BACKWARD])

    @property
    def together(self) -> str:
        return "together" if self.accumulates else "together (gradients come as activations go)"


def estimate_memory(config: TrainingConfig, model: CausalLM, world_size: int, tokens: int) -> Memory:
    """Of a converted model on the meta device, with ``tokens`` in a forward pass.

    States are exact, and what layers keep is counted; their backward pass and the head's work are rough.
    """
    # Reinforcement learning has replicas alone, whatever the recipe says.
    shards = 1 if isinstance(config, RlConfig) else world_size // config.parallel.replicate
    parameters = model.config.num_parameters()
    train = config.train
    one_batch = isinstance(train, TrainSection) and train.global_batch <= train.micro_batch * world_size
    moments = config.optim.moments
    lasting = {
        "master weights (float32)": 4.0 * parameters / shards,
        f"AdamW moments ({moments})": (8.0 if moments == "float32" else 4.0) * parameters / shards,
        "FP8 weights": float(sum(_fp8_bytes(module) for module in model.modules() if isinstance(module, Fp8Linear))),
    }
    if isinstance(config, RlConfig) and config.policy.kl_coef:
        lasting["reference of the KL term"] = lasting["master weights (float32)"] + lasting["FP8 weights"]
    if shards > 1:
        lasting["gathered weights"] = _gathered(config, model)
    # FSDP2 adds up whole gradients until the last micro-batch of a step.
    whole = shards == 1 or not one_batch
    gradients = 4.0 * parameters / (1 if whole else shards)
    return Memory(lasting, _passing(config, model, tokens), gradients, accumulates=not one_batch)


def _passing(config: TrainingConfig, model: CausalLM, tokens: int) -> dict[str, float]:
    shape, width = model.config, torch.finfo(model.model.compute_dtype).bits // 8
    kept = kept_by_layers(model, tokens, config.train.compile)
    policy, stream = config.train.activation_checkpointing, tokens * shape.hidden_size * width
    heads = 2 * (shape.num_attention_heads + shape.num_key_value_heads) * shape.head_dim * width
    # Attention keeps q, k, v, its output and a float32 sum a head.
    attention = tokens * (heads + 4 * shape.num_attention_heads)
    activations = {
        "none": sum(kept), "attention": len(kept) * (stream + attention), "full": len(kept) * stream
    }[policy]  # fmt: skip
    # In the backward pass of an MLP: the gradients of its inner activations, and the operands of its GEMMs.
    working = 8 * tokens * shape.intermediate_size + (0 if policy == "none" else max(kept))
    # The head's weight in the compute dtype, or its FP8 codes and their transpose; its float32 gradient; some logits,
    # and FP8 codes of more.
    weight = 2 if config.fp8.head else width
    held = CHUNK_LOGITS + min(tokens * shape.vocab_size, HELD_CHUNKS * CHUNK_LOGITS) if config.fp8.head else 0
    head = (weight + 4) * shape.vocab_size * shape.hidden_size + width * CHUNK_LOGITS + held
    return {
        "activations": float(activations),
        _BACKWARD: float(working),
        "output head (FP8)" if config.fp8.head else "output head": float(head),
    }


def _fp8_bytes(linear: Fp8Linear) -> int:
    """Codes, and those of the transpose where they are not the same; scales are next to nothing."""
    return linear.weight.numel() * (1 if linear.recipe.weight_transposes else 2)


def _gathered(config: TrainingConfig, model: CausalLM) -> float:
    """What FSDP2 holds of whole weights: embedding and head, and two layers, or all where they are not let go."""
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    outside = model.config.num_parameters() - sum(layers)
    width = torch.finfo(getattr(torch, config.parallel.gather_dtype)).bits // 8
    return float(width * (outside + sum(layers[:2] if config.parallel.reshard_after_forward else layers)))
