"""The engine against transformers and against the trainer's own forward pass, whatever the batch looks like."""

import dataclasses
from pathlib import Path

import pytest
import torch
from small_engine import (
    ARCHITECTURE,
    assert_nothing_is_held,
    assert_same,
    flat,
    make_model,
    mixed_requests,
    prompts,
    worst_gap,
)
from transformers import AutoConfig, AutoModelForCausalLM

from infir2.data.tokenizer import load_tokenizer, train_tokenizer
from infir2.model.transformer import CausalLM
from infir2.rollout.engine import Engine
from infir2.rollout.options import EngineOptions
from infir2.rollout.records import Request, SamplingParams


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return make_model()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["the cat sat on the mat, the dog on the log"] * 20, 300, folder)
    return load_tokenizer(folder)


def test_greedy_tokens_and_logprobs_equal_transformers(model: CausalLM) -> None:
    """200 prompts of mixed lengths. Where a near-tie flips, both choices must be equally likely to 1e-5."""
    content = ARCHITECTURE.to_hf() | {"dtype": "float32", "torch_dtype": "float32"}
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**content), attn_implementation="eager").eval()
    theirs.load_state_dict(model.state_dict(), strict=True)
    texts, new = prompts(200), 24
    longest = max(map(len, texts))
    ids = torch.tensor([(0,) * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    with torch.no_grad():
        out = theirs.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=0)
    expected = out[:, longest:].tolist()

    params = SamplingParams(temperature=0.0, max_new_tokens=new)
    engine = Engine(model, options=EngineOptions(max_sequences=64, max_batch_tokens=256, cache_tokens=8192))
    got = flat(engine.generate([Request(text, params) for text in texts]))
    assert all(completion.finish_reason == "length" for completion in got)
    flipped = 0
    for text, completion, tokens in zip(texts, got, expected):
        with torch.no_grad():
            row = torch.tensor([text + completion.token_ids])
            table = theirs(row).logits[0].log_softmax(-1)[len(text) - 1 : -1]
        chosen = table.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert (chosen - torch.tensor(completion.logprobs)).abs().max() < 1e-5
        if list(completion.token_ids) != tokens:
            flipped += 1
            first = next(i for i in range(new) if completion.token_ids[i] != tokens[i])
            assert (table[first, tokens[first]] - chosen[first]).abs() < 1e-5
    print(f"near-ties that flipped: {flipped} of 200")
    assert flipped <= 2
    assert len({completion.token_ids for completion in got}) > 150, "the model repeats itself: the test sees too little"
    assert_nothing_is_held(engine)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "qwen3", "qkv_bias": False, "qk_norm": True, "tie_word_embeddings": False},
        {"model_type": "llama", "qkv_bias": False, "num_key_value_heads": 1},
    ],
    ids=lambda changes: changes["model_type"],
)
def test_other_families_equal_their_own_forward_pass(changes: dict) -> None:
    model = make_model(dataclasses.replace(ARCHITECTURE, **changes))
    requests = mixed_requests(10)
    completions = flat(Engine(model).generate(requests))
    assert worst_gap(model, requests, completions) < 1e-5


def test_samples_do_not_depend_on_the_batch(model: CausalLM) -> None:
    requests = mixed_requests(50)
    together = flat(Engine(model).generate(requests))
    assert worst_gap(model, requests, together) < 1e-5
    alone = Engine(model)
    for number in range(0, 50, 3):
        assert_same(flat(alone.generate([requests[number]])), [together[number]])
    backwards = flat(Engine(model).generate(requests[::-1]))
    assert_same(backwards[::-1], together)


def test_preemption_changes_nothing(model: CausalLM) -> None:
    requests = mixed_requests(30, new=24)
    expected = flat(Engine(model).generate(requests))
    for prefix_cache in (True, False):
        tiny = Engine(model, options=EngineOptions(cache_tokens=160, block_size=4, prefix_cache=prefix_cache))
        assert_same(flat(tiny.generate(requests)), expected)
        print(f"preemptions: {tiny.stats().preemptions}")
        assert tiny.stats().preemptions > 10
        assert tiny.stats().computed_tokens > sum(len(r.prompt_ids) + 24 for r in requests)
        assert_nothing_is_held(tiny)


@pytest.mark.parametrize(("budget", "block_size"), [(8, 16), (33, 4), (4096, 32)])
def test_chunks_and_block_size_change_nothing(model: CausalLM, budget: int, block_size: int) -> None:
    requests = mixed_requests(20)
    expected = flat(Engine(model).generate(requests))
    options = EngineOptions(max_sequences=8, max_batch_tokens=budget, block_size=block_size, cache_tokens=4096)
    assert_same(flat(Engine(model, options=options).generate(requests)), expected)


@pytest.mark.parametrize(("rounds", "cache_tokens"), [(3, 4096), (16, 4096), (5, 160)])
def test_rounds_without_the_host_change_nothing(model: CausalLM, rounds: int, cache_tokens: int) -> None:
    """Ends in the middle of a run, runs cut short by a full cache, and prefixes that such runs left in the cache."""
    requests = mixed_requests(30, new=24)
    for i, sample in enumerate(flat(Engine(model).generate(requests))):
        if i % 2:  # ends at any place
            ends = (sample.token_ids[i % 24],)
            params = dataclasses.replace(requests[i].params, stop_token_ids=ends)
            requests[i] = dataclasses.replace(requests[i], params=params)
    plain = Engine(model)
    expected = flat(plain.generate(requests))
    engine = Engine(model, options=EngineOptions(cache_tokens=cache_tokens, block_size=4, decode_rounds=rounds))
    found = flat(engine.generate(requests))
    assert_same(found, expected)
    assert {sample.finish_reason for sample in found} == {"stop", "length"}
    assert engine.stats().generated_tokens == plain.stats().generated_tokens
    assert (engine.stats().preemptions > 0) == (cache_tokens == 160)
    assert_nothing_is_held(engine)
    longer = [
        Request((*request.prompt_ids, *sample.token_ids), dataclasses.replace(request.params, max_new_tokens=5))
        for request, sample in zip(requests, found)
    ]
    assert_same(flat(engine.generate(longer)), flat(Engine(model).generate(longer)))
    assert (engine.stats().cached_tokens > 0) == (cache_tokens == 4096)


def test_rounds_stream_every_token_once(model: CausalLM) -> None:
    engine = Engine(model, options=EngineOptions(decode_rounds=7))
    ids = [engine.add_request(Request((1, 2, 3 + i), SamplingParams(max_new_tokens=10 + i))) for i in range(3)]
    events = []
    while engine.has_unfinished:
        events += engine.step()
    for request_id in ids:
        mine = [event for event in events if event.request_id == request_id]
        assert tuple(event.token_id for event in mine) == mine[-1].completion.token_ids
        assert all(event.completion is None for event in mine[:-1])
        assert tuple(event.logprob for event in mine) == mine[-1].completion.logprobs


def test_seeds_and_samples(model: CausalLM) -> None:
    prompt = prompts(1)[0]

    def run(seed: int | None, n: int = 1, engine_seed: int = 0) -> list[tuple[int, ...]]:
        engine = Engine(model, options=EngineOptions(seed=engine_seed))
        request = Request(prompt, SamplingParams(max_new_tokens=12, seed=seed, n=n))
        return [completion.token_ids for samples in engine.generate([request, request]) for completion in samples]

    assert run(3, n=4)[:4] == run(3, n=4)[4:] == run(3, n=6)[:4]
    assert run(3)[0] == run(3, n=4)[0] != run(4)[0]
    assert len(set(run(3, n=4))) == 4
    unseeded = run(None, n=3)
    assert len(set(unseeded)) == 6, "requests without a seed must differ from each other"
    assert unseeded == run(None, n=3) != run(None, n=3, engine_seed=1)


def test_samples_of_a_prompt_share_its_keys_and_values(model: CausalLM) -> None:
    prompt = tuple(range(100))
    engine = Engine(model)
    (samples,) = engine.generate([Request(prompt, SamplingParams(max_new_tokens=4, n=8, raw_logprobs=True))])
    assert [sample.index for sample in samples] == list(range(8))
    assert [sample.cached_tokens for sample in samples] == [0] + [96] * 7
    assert engine.stats().cached_tokens == 7 * 96
    assert engine.stats().computed_tokens == 100 + 7 * 4 + 8 * 3
    assert worst_gap(model, [Request(prompt)] * 8, samples) < 1e-5


def test_stop_tokens(model: CausalLM) -> None:
    prompt = prompts(1)[0]
    free = SamplingParams(temperature=0.0, max_new_tokens=12)
    engine = Engine(model)
    tokens = engine.generate([Request(prompt, free)])[0][0].token_ids
    third = tokens[2]
    cut = tokens.index(third) + 1

    stopped = engine.generate([Request(prompt, dataclasses.replace(free, stop_token_ids=(third,)))])[0][0]
    assert (stopped.token_ids, stopped.finish_reason) == (tokens[:cut], "stop")
    assert len(stopped.logprobs) == len(stopped.versions) == cut

    ending = make_model(dataclasses.replace(ARCHITECTURE, eos_token_ids=(third,)))
    assert Engine(ending).generate([Request(prompt, free)])[0][0].token_ids == tokens[:cut]
    ignoring = Engine(ending).generate([Request(prompt, dataclasses.replace(free, ignore_eos=True))])[0][0]
    assert (ignoring.token_ids, ignoring.finish_reason) == (tokens, "length")


@pytest.mark.parametrize("rounds", [1, 6])
def test_stop_strings_and_text(model: CausalLM, tokenizer, rounds: int) -> None:
    engine = Engine(model, tokenizer, EngineOptions(decode_rounds=rounds))
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    requests = [Request((5,), dataclasses.replace(params, seed=seed)) for seed in range(20)]
    stops = checked = 0
    for request, plain in zip(requests, flat(engine.generate(requests))):
        assert plain.text == tokenizer.decode(plain.token_ids, skip_special_tokens=True)
        stop = plain.text[10:13]  # may begin and end within tokens
        if "\ufffd" in stop:
            continue
        checked += 1
        params = dataclasses.replace(request.params, stop=("never appears", stop))
        done = engine.generate([Request(request.prompt_ids, params)])[0][0]
        assert done.finish_reason == "stop"
        assert done.text == plain.text[: plain.text.index(stop)]
        assert done.token_ids == plain.token_ids[: len(done.token_ids)]
        # Not one token too many: without the last one the text does not hold the stop string.
        assert stop in tokenizer.decode(done.token_ids, skip_special_tokens=True)
        assert stop not in tokenizer.decode(done.token_ids[:-1], skip_special_tokens=True)
        stops += 1
    assert stops == checked >= 5
    assert not engine._texts


def test_the_stop_token_is_no_part_of_the_text(model: CausalLM, tokenizer) -> None:
    engine = Engine(model, tokenizer)
    params = SamplingParams(temperature=0.0, max_new_tokens=8)
    plain = engine.generate([Request((5,), params)])[0][0]
    stopped = engine.generate([Request((5,), dataclasses.replace(params, stop_token_ids=(plain.token_ids[0],)))])[0][0]
    assert (stopped.token_ids, stopped.text) == (plain.token_ids[:1], "")
