"""What is done to the rollout engine from outside: aborts, weight updates, sleep, faults, refused requests."""

import dataclasses
import itertools
import random

import pytest
import torch
from small_engine import (
    ARCHITECTURE,
    FP8_ARCHITECTURE,
    VOCAB,
    assert_nothing_is_held,
    assert_same,
    flat,
    float32_attention,
    forward_logprobs,
    gaps,
    make_model,
    mixed_requests,
    prompts,
    worst_gap,
)

from infir2.errors import ConfigError
from infir2.fp8.convert import convert, refresh_weights
from infir2.fp8.linear import Fp8Linear
from infir2.fp8.recipe import recipe_named
from infir2.kernels import quantize
from infir2.model.attention import causal_attention
from infir2.model.transformer import CausalLM
from infir2.rollout.cache_size import bytes_per_token, stored_dtype
from infir2.rollout.engine import Engine
from infir2.rollout.interface import RolloutEngine
from infir2.rollout.options import EngineOptions
from infir2.rollout.records import Completion, Request, RequestError, SamplingParams


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return make_model()


def test_abort_returns_what_there_is_and_frees_the_blocks(model: CausalLM) -> None:
    engine = Engine(model)
    keep = engine.add_request(Request((1, 2, 3), SamplingParams(max_new_tokens=10)))
    drop = engine.add_request(Request(tuple(range(50)), SamplingParams(max_new_tokens=100, n=3)), "mine")
    events = [event for _ in range(5) for event in engine.step()]
    held = engine.stats().blocks_held
    aborted = engine.abort(drop)
    assert engine.stats().blocks_held < held
    assert engine.abort(drop) == engine.abort("unknown") == []
    assert [sample.finish_reason for sample in aborted] == ["abort"] * 3
    for sample in aborted:
        assert sample.token_ids == tuple(
            e.token_id for e in events if (e.request_id, e.index) == ("mine", sample.index)
        )
    assert sum(len(sample.token_ids) for sample in aborted) > 3
    finished = []
    while engine.has_unfinished:
        finished += [event.completion for event in engine.step() if event.completion]
    assert [(done.request_id, len(done.token_ids)) for done in finished] == [(keep, 10)]
    assert_nothing_is_held(engine)


@pytest.mark.parametrize("rounds", [1, 4])
def test_a_thousand_random_requests_and_aborts_leak_nothing(model: CausalLM, rounds: int) -> None:
    rng = random.Random(5)
    options = EngineOptions(cache_tokens=96, block_size=4, max_sequences=6, max_batch_tokens=32, decode_rounds=rounds)
    engine = Engine(model, options=options)
    alive: list[str] = []
    finished = aborted = 0
    texts = prompts(30, longest=40)
    for _ in range(1000):
        if rng.random() < 0.5:
            params = SamplingParams(max_new_tokens=rng.randint(1, 12), n=rng.choice([1, 1, 2, 3]))
            alive.append(engine.add_request(Request(rng.choice(texts), params)))
        elif alive:
            aborted += len(engine.abort(alive.pop(rng.randrange(len(alive)))))
        if rng.random() < 0.5:
            finished += sum(event.completion is not None for event in engine.step())
    aborted += len(engine.pause("abort"))
    print(f"{finished} finished, {aborted} aborted, {engine.stats().preemptions} preemptions")
    assert finished > 30
    assert aborted > 300
    assert engine.stats().preemptions > 0
    assert_nothing_is_held(engine)


def test_weight_updates_flush_the_prefixes_and_stamp_the_tokens() -> None:
    model, other = make_model(seed=0), make_model(seed=1)
    engine = Engine(model, weight_version=7)
    request = Request(tuple(range(40)), SamplingParams(max_new_tokens=3, seed=1, raw_logprobs=True))

    before = engine.generate([request])[0][0]
    assert engine.generate([request])[0][0].cached_tokens == 32
    checksum = engine.checksum()
    engine.begin_update(8)
    with pytest.raises(RuntimeError, match="being updated"):
        engine.generate([request])
    with pytest.raises(RuntimeError, match="being updated"):
        engine.step()
    model.load_state_dict(other.state_dict())  # as a trainer does it: in place
    engine.end_update()
    after = engine.generate([request])[0][0]
    assert (before.versions, after.versions) == ((7,) * 3, (8,) * 3)
    assert after.cached_tokens == 0
    assert worst_gap(other, [request], [after]) < 1e-5
    assert engine.checksum() != checksum

    engine.begin_update(9)
    engine.update(make_model(seed=0).state_dict().items())
    engine.end_update()
    assert engine.generate([request])[0][0].token_ids == before.token_ids
    assert engine.checksum() == checksum


def test_an_update_needs_its_order() -> None:
    engine = Engine(make_model(), weight_version=2)
    with pytest.raises(RuntimeError, match="without begin_update"):
        engine.end_update()
    with pytest.raises(RuntimeError, match="without begin_update"):
        engine.update([])
    with pytest.raises(ValueError, match="version 2 does not follow 2"):
        engine.begin_update(2)
    engine.begin_update(3)
    with pytest.raises(RuntimeError, match="has not ended"):
        engine.begin_update(4)
    with pytest.raises(ValueError, match="no parameter of that name"):
        engine.update([("model.nothing", torch.zeros(1))])
    with pytest.raises(ValueError, match=r"the model has shape \[64\]"):
        engine.update([("model.norm.weight", torch.zeros(3))])


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_weights_may_change_in_flight(mode: str) -> None:
    model, other = make_model(seed=0), make_model(seed=1)
    engine = Engine(model)
    request = Request(tuple(range(40)), SamplingParams(max_new_tokens=8, seed=1, raw_logprobs=True))

    def change(finished: int, total: int) -> None:
        if engine.stats().steps == 4:
            assert engine.pause(mode) == []
            assert engine.step() == []
            engine.begin_update(1)
            model.load_state_dict(other.state_dict())
            engine.end_update()
            engine.resume()

    (done,) = engine.generate([request], change)[0]
    assert done.versions == (0,) * 4 + (1,) * 4
    expected = forward_logprobs(other, request.prompt_ids, done.token_ids)
    gap = (expected - torch.tensor(done.raw_logprobs)).abs()
    # Recomputed, the later tokens are exactly what the new weights give; else they still see the old keys and values.
    assert (gap[4:].max() < 1e-5) == (mode == "recompute")
    again = engine.generate([request])[0][0]
    assert again.cached_tokens == (32 if mode == "recompute" else 0), "a mixed prefix must not be reused"


def test_sleep_frees_the_cache_and_nothing_is_lost(model: CausalLM) -> None:
    requests = mixed_requests(6, new=12)
    expected = flat(Engine(model).generate(requests))
    engine = Engine(model)
    ids = [engine.add_request(request) for request in requests]
    size = engine.stats().cache_bytes
    assert size == 2 * 2 * (65_536 + 16) * 2 * 16 * 4  # layers, keys and values, tokens and a spare block, ...
    found: dict[str, Completion] = {}
    while engine.has_unfinished:
        if engine.stats().steps in (3, 7):
            engine.sleep()
            engine.sleep()
            assert engine.stats().cache_bytes == 0
            assert engine.stats().blocks_held == 0
            with pytest.raises(RuntimeError, match="asleep"):
                engine.step()
            engine.wake()
            engine.wake()
            assert engine.stats().cache_bytes == size
        found |= {e.completion.request_id: e.completion for e in engine.step() if e.completion}
    assert_same([found[request_id] for request_id in ids], expected)


@pytest.mark.parametrize("cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_size_foretold_for_a_token_is_what_the_cache_takes(cache_dtype: str, dtype: torch.dtype) -> None:
    model, options = make_model(dtype=dtype), EngineOptions(cache_tokens=1024, block_size=16, cache_dtype=cache_dtype)
    token = bytes_per_token(2, 2, 16, stored_dtype(cache_dtype, dtype))
    assert Engine(model, options=options).stats().cache_bytes == (1024 + 16) * token  # and a spare block


@pytest.mark.parametrize("recipe", ["blockwise", "rowwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_fp8_weights_are_the_trainers(recipe: str, dtype: torch.dtype) -> None:
    model = make_model(FP8_ARCHITECTURE, dtype=dtype)
    report = convert(model, recipe_named(recipe))
    assert len(report.converted) == 14
    refresh_weights(model)
    layer = next(module for module in model.modules() if isinstance(module, Fp8Linear))
    codes = layer.weight_operand().codes.data_ptr()
    requests = mixed_requests(20)
    engine = Engine(model)
    assert engine.capabilities.fp8_weights
    assert engine.capabilities.batch_invariant
    completions = flat(engine.generate(requests))
    assert layer.weight_operand().codes.data_ptr() == codes, "the engine quantised the weights again"
    found = gaps(model, requests, completions)
    same_attention = gaps(model, requests, completions, float32_attention)
    print(f"{recipe} {dtype}: mean {found.mean():.1e}, with the same attention {same_attention.mean():.1e}")
    # What is left in bfloat16 is the rounding inside the trainer's attention kernel, not the engine.
    assert found.mean() < (1e-4 if dtype == torch.float32 else 8e-3)
    assert same_attention.mean() < (1e-4 if dtype == torch.float32 else 1e-3)
    for number in (0, 7, 19):  # alone, and so with other numbers of rows in every GEMM
        assert_same(flat(engine.generate([requests[number]])), [completions[number]])
    # The trainer's backward pass still works with the codes that the engine has used.
    loss = model(torch.tensor([[1, 2, 3]]), torch.arange(3)[None], causal_attention).float().square().mean()
    loss.backward()


def test_activation_codes_of_a_token_do_not_depend_on_its_batch() -> None:
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(0))
    for granularity in ("tile", "channel"):
        codes, scale = quantize.quantize(x, granularity, "ue8m0")
        for rows in (slice(7, 8), slice(3, 30)):
            part, part_scale = quantize.quantize(x[rows], granularity, "ue8m0")
            assert torch.equal(part.view(torch.uint8), codes[rows].view(torch.uint8))
            assert torch.equal(part_scale, scale[rows])
    model = make_model(FP8_ARCHITECTURE)
    convert(model, recipe_named("tensorwise"))
    assert not Engine(model).capabilities.batch_invariant


def test_fp8_cache_stays_close() -> None:
    model = make_model(FP8_ARCHITECTURE)
    requests = mixed_requests(20)
    engine = Engine(model, options=EngineOptions(cache_dtype="fp8"))
    assert engine.capabilities.fp8_cache
    completions = flat(engine.generate(requests))
    found = gaps(model, requests, completions)
    print(f"FP8 cache: mean {found.mean():.1e}, largest {found.max():.1e}")
    assert 1e-5 < found.mean() < 0.01
    # It is as independent of the batch as any other: a token's scale is its own.
    assert_same(flat(engine.generate(requests[4:5])), completions[4:5], tolerance=1e-3)


def test_generate_leaves_nothing_behind_when_it_is_interrupted(model: CausalLM) -> None:
    engine = Engine(model)
    requests = mixed_requests(5)

    def interrupt(finished: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(requests, interrupt)
    assert_nothing_is_held(engine)
    with pytest.raises(RequestError):
        engine.generate([*requests, Request(())])
    assert_nothing_is_held(engine)
    with pytest.raises(RuntimeError, match="the engine is paused"):
        engine.generate(requests, lambda finished, total: engine.pause() and None)
    engine.resume()
    assert_nothing_is_held(engine)
    engine.add_request(requests[0])
    with pytest.raises(RuntimeError, match="for itself"):
        engine.generate(requests)


def test_progress_counts_and_may_abort(model: CausalLM) -> None:
    engine = Engine(model)
    seen: list[tuple[int, int]] = []

    def watch(finished: int, total: int) -> None:
        seen.append((finished, total))
        if len(seen) == 5:
            engine.abort("request-1")

    requests = [Request((1, 2), SamplingParams(max_new_tokens=new, n=2)) for new in (3, 20, 9)]
    completions = engine.generate(requests, watch)
    assert [len(samples) for samples in completions] == [2, 2, 2]
    assert [samples[0].finish_reason for samples in completions] == ["length", "abort", "length"]
    assert len(completions[1][0].token_ids) == 5
    assert seen[0] == (0, 6)
    assert seen[-1] == (6, 6)
    assert all(a <= b for a, b in itertools.pairwise(seen))


def test_weights_that_are_not_finite_are_noticed() -> None:
    model = make_model()
    engine = Engine(model, weight_version=3)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match="weight version 3"):
        engine.generate([Request((1, 2, 3), SamplingParams(max_new_tokens=4))])
    assert_nothing_is_held(engine)


def test_of_rounds_with_a_number_that_is_not_finite_no_token_is_kept() -> None:
    """One sequence of two meets a broken embedding while several rounds run without the host."""
    model = make_model(dataclasses.replace(ARCHITECTURE, tie_word_embeddings=False))
    engine = Engine(model, options=EngineOptions(decode_rounds=4))
    taken = [
        engine.add_request(Request((1, 2, 3 + i), SamplingParams(max_new_tokens=9, ignore_eos=True))) for i in (0, 1)
    ]
    engine.step()
    sequences = [engine._unfinished[request][0] for request in taken]
    before = [list(sequence.tokens) for sequence in sequences]
    assert before[0][-1] != before[1][-1]
    with torch.no_grad():
        model.model.embed_tokens.weight[before[1][-1]] = torch.nan
    with pytest.raises(FloatingPointError):
        engine.step()
    assert [sequence.tokens for sequence in sequences] == before


@pytest.mark.parametrize("rounds", [1, 4])
def test_of_log_probabilities_that_are_not_finite_no_token_is_kept(rounds: int) -> None:
    """The logits are fine, the distribution that is drawn from is not."""
    engine = Engine(make_model(), options=EngineOptions(decode_rounds=rounds))
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    taken = engine.add_request(Request((1, 2, 3), params))
    engine.step()
    object.__setattr__(params, "temperature", 1e-40)  # past the check that makes it 0
    before = list(engine._unfinished[taken][0].tokens)
    with pytest.raises(FloatingPointError):
        engine.step()
    assert engine._unfinished[taken][0].tokens == before


@pytest.mark.parametrize("temperature", [9e-6, 1e-20, 1e-38, 1e-45, 5e-324])
def test_a_temperature_that_floats_cannot_divide_by_is_greedy(temperature: float) -> None:
    engine = Engine(make_model())
    asked = [Request((1, 2, 3), SamplingParams(temperature=t, max_new_tokens=6, seed=1)) for t in (0.0, temperature)]
    greedy, tiny = flat(engine.generate(asked))
    assert (tiny.token_ids, tiny.logprobs) == (greedy.token_ids, greedy.logprobs)
    smallest = Request((1, 2, 3), SamplingParams(temperature=1e-5, max_new_tokens=6, seed=1))
    (drawn,) = flat(engine.generate([smallest]))
    assert drawn.token_ids == greedy.token_ids
    assert drawn.logprobs == (0.0,) * 6, "drawn, from a distribution with one token"


def test_checksums_tell_weights_apart() -> None:
    model = make_model(FP8_ARCHITECTURE)
    plain = Engine(model).checksum()
    assert plain == Engine(make_model(FP8_ARCHITECTURE)).checksum()
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight[0, 0], weight[0, 1] = weight[0, 1].item(), weight[0, 0].item()
    assert plain != Engine(model).checksum()
    convert(model, recipe_named("blockwise"))
    refresh_weights(model)
    converted = Engine(model).checksum()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj._operand.codes.view(torch.uint8)[0, 0] ^= 1
    assert converted != Engine(model).checksum()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(()), "no tokens"),
        (Request((1, VOCAB)), f"outside 0 to {VOCAB - 1}"),
        (Request((-1,)), "outside 0 to"),
        (
            Request((1,) * 200, SamplingParams(max_new_tokens=57)),
            "200 prompt tokens and max_new_tokens 57 exceed the 256",
        ),
        (Request((1,) * 40, SamplingParams(max_new_tokens=100)), "cache of 128 tokens; raise cache_tokens"),
        (Request((1,), SamplingParams(stop=("x",), max_new_tokens=2)), "need an engine with a tokenizer"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(model: CausalLM, request_: Request, message: str) -> None:
    engine = Engine(model, options=EngineOptions(cache_tokens=128))
    with pytest.raises(RequestError, match=message):
        engine.add_request(request_)
    assert_nothing_is_held(engine)
    engine.add_request(Request((1,), SamplingParams(max_new_tokens=2)), "twice")
    with pytest.raises(RequestError, match="twice: a request with this id"):
        engine.add_request(Request((1,), SamplingParams(max_new_tokens=2)), "twice")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_size": 0}, "block_size: 0"),
        ({"max_sequences": 512, "max_batch_tokens": 256}, "max_batch_tokens: 256 is less than max_sequences"),
        ({"cache_tokens": 8}, "cache_tokens: 8 is less than one block"),
        ({"max_length": 0}, "max_length: 0 is less than 1"),
        ({"decode_rounds": -1}, "decode_rounds: -1 is less than 0"),
        ({"cache_dtype": "int4"}, "cache_dtype: 'int4'"),
    ],
)
def test_options_that_do_not_fit_are_named(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineOptions(**values)


def test_the_engine_is_a_rollout_engine(model: CausalLM) -> None:
    """The names; mypy checks the signatures where the stages hand an engine over."""
    names = {name for name in vars(RolloutEngine) if not name.startswith("_")}
    assert {"generate", "begin_update", "checksum"} <= names
    assert names <= set(dir(Engine(model)))
