"""Paged attention, sampling and the engine on the GPU: kernels against their twins, graphs against plain rounds."""

import dataclasses

import pytest
import torch
from torch import Tensor

from infir2.fp8.convert import convert, refresh_weights
from infir2.fp8.recipe import recipe_named
from infir2.kernels import paged_attention, paged_layout
from infir2.kernels.paged_layout import PagedCache, PagedLayout
from infir2.kernels.reference import FP8
from infir2.kernels.row_codes import quantize_rows
from infir2.kernels.sample import SamplingBatch, sample
from infir2.kernels.sample_filter import filter_logits
from infir2.model.presets import preset
from infir2.model.transformer import CausalLM
from infir2.rollout.engine import Engine
from infir2.rollout.options import EngineOptions
from infir2.rollout.records import Completion, Request, SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
LENGTHS = [1, 5, 700, 17, 333, 48, 64, 65]
QUERIES = [1, 5, 1, 17, 100, 48, 64, 1]
HEADS, KV_HEADS, HEAD_DIM, BLOCK = 12, 2, 128, 16


def layout_for(lengths: list[int], queries: list[int], tables: Tensor) -> PagedLayout:
    slots = [
        int(tables[s, i // BLOCK]) * BLOCK + i % BLOCK
        for s, (length, new) in enumerate(zip(lengths, queries))
        for i in range(length - new, length)
    ]
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    contexts = torch.tensor(lengths, dtype=torch.int32)
    decoding = next((i for i, new in enumerate(queries) if new > 1), len(queries))
    tiles = paged_layout.query_tiles(queries, decoding)
    return PagedLayout(torch.tensor(slots), starts, contexts, tables, tiles, decoding)


def moved(record: PagedCache | PagedLayout, device: str) -> PagedCache | PagedLayout:
    fields = {name: value.to(device) for name, value in vars(record).items() if isinstance(value, Tensor)}
    return dataclasses.replace(record, **fields)


@pytest.mark.parametrize("cache_dtype", ["same", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("queries", [QUERIES, [1] * 8], ids=["mixed", "decoding"])
def test_paged_attention_equals_its_twin(queries: list[int], dtype: torch.dtype, cache_dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    width = max(LENGTHS) // BLOCK + 1
    tables = torch.randperm(8 * width, generator=generator).view(8, width).int()
    cache = paged_layout.empty_cache(
        8 * width, BLOCK, KV_HEADS, HEAD_DIM, FP8 if cache_dtype == "fp8" else dtype, "cpu"
    )
    whole = layout_for(LENGTHS, LENGTHS, tables)
    keys, values = torch.randn(2, sum(LENGTHS), KV_HEADS, HEAD_DIM, generator=generator).to(dtype)
    on_gpu = moved(cache, "cuda")
    paged_attention.write(cache, keys, values, whole.slots)
    paged_attention.write(on_gpu, keys.cuda(), values.cuda(), whole.slots.cuda())
    for name, pool in vars(cache).items():
        if pool is not None:
            got = getattr(on_gpu, name).cpu().flatten(0, 1)[whole.slots]
            assert torch.equal(got.view(torch.uint8), pool.flatten(0, 1)[whole.slots].view(torch.uint8)), name
    layout = layout_for(LENGTHS, queries, tables)
    q = torch.randn(sum(queries), HEADS, HEAD_DIM, generator=generator).to(dtype)
    expected = paged_attention.attend(q, cache, layout).float()
    got = paged_attention.attend(q.cuda(), on_gpu, moved(layout, "cuda")).cpu().float()
    assert (got - expected).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2)


SHAPES = [(16, 1, 2), (32, 1, 3), (64, 2, 3), (64, 4, 4), (128, 4, 2), (128, 8, 2)]


@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 2), (28, 4)])
def test_decoding_in_any_shape(
    heads: int, kv_heads: int, cache_dtype: torch.dtype, heads_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contexts of all lengths around a tile, values of very different sizes, in one part and in several; the rest of
    the pool is NaN. As codes they are those of the plain result."""
    from infir2.kernels import paged_decode_triton

    lengths = [*range(1, 20), 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000]
    generator = torch.Generator().manual_seed(heads)
    count, width = len(lengths), max(lengths) // BLOCK + 1
    tables = torch.randperm(count * width, generator=generator).view(count, width).int()
    caches = [
        paged_layout.empty_cache(count * width, BLOCK, kv_heads, HEAD_DIM, cache_dtype, device, heads_first=first)
        for device, first in (("cpu", False), ("cuda", heads_first))
    ]
    for cache in caches:
        for pool in (cache.keys, cache.values):
            pool.view(torch.uint8).fill_(0x7F if cache_dtype == FP8 else 0xFF)
    whole, layout = layout_for(lengths, lengths, tables), layout_for(lengths, [1] * count, tables)
    keys, values = torch.randn(2, sum(lengths), kv_heads, HEAD_DIM, generator=generator).bfloat16()
    values *= 2.0 ** torch.randint(-20, 20, (sum(lengths), 1, 1), generator=generator)
    paged_attention.write(caches[0], keys, values, whole.slots)
    paged_attention.write(caches[1], keys.cuda(), values.cuda(), whole.slots.cuda())
    q = (torch.randn(count, heads, HEAD_DIM, generator=generator) * 3).bfloat16()
    expected = paged_attention.attend(q, caches[0], layout).float()
    largest = expected.abs().amax(dim=-1, keepdim=True)
    on_gpu = moved(layout, "cuda")
    for keys_at_once, warps, stages in SHAPES:
        shape = {"KEYS": keys_at_once, "num_warps": warps, "num_stages": stages}
        monkeypatch.setattr(paged_decode_triton, "_SHAPES", {cache_dtype: shape})
        for programs in (1, 1024):
            monkeypatch.setattr(paged_decode_triton, "_PROGRAMS", {cache_dtype: programs})
            got = paged_attention.attend(q.cuda(), caches[1], on_gpu)
            assert ((got.cpu().float() - expected).abs() / largest).max() < 2e-2, (shape, programs)
            codes, scale = paged_attention.attend_quantize(q.cuda(), caches[1], on_gpu, 128)
            plain_codes, plain_scale, _ = quantize_rows(got.flatten(1), False)
            assert torch.equal(codes[:count].view(torch.uint8), plain_codes.view(torch.uint8))
            assert torch.equal(scale[:count], plain_scale)


def sampling_batch(rows: int, filtered: bool, generator: torch.Generator) -> SamplingBatch:
    temperature = torch.rand(rows, generator=generator) * 1.5
    temperature[::7] = 0.0
    top_k, top_p = torch.zeros(rows, dtype=torch.int64), torch.ones(rows).double()
    if filtered:
        top_k = torch.randint(1, 200, (rows,), generator=generator)
        top_p = torch.rand(rows, generator=generator).double()
        top_k[::3], top_p[::4] = 0, 1.0
    keys = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
    return SamplingBatch(temperature, top_k, top_p, keys, torch.arange(rows), filtered)


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_drawing_equals_its_twin(dtype: torch.dtype, filtered: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = 100 if filtered else 300  # the twin sorts
    logits = (torch.randn(rows, 151_936, generator=generator) * 3).to(dtype)
    batch = sampling_batch(rows, filtered, generator)
    expected = sample(logits, batch)
    fields = {name: value.cuda() for name, value in vars(batch).items() if isinstance(value, Tensor)}
    got = sample(logits.cuda(), dataclasses.replace(batch, **fields))
    same = got.tokens.cpu() == expected.tokens
    assert same.float().mean() > 0.98, "sums in another order move a token only where the number meets its border"
    assert torch.allclose(got.logprobs.cpu()[same], expected.logprobs[same], atol=1e-4)
    assert torch.allclose(got.raw_logprobs.cpu()[same], expected.raw_logprobs[same], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_top_k_and_top_p_leave_equals_the_twins(dtype: torch.dtype) -> None:
    """With many ties: of equal logits the lower ids stay."""
    from infir2.kernels.sample_filter_triton import limits

    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(64, 20_000, generator=generator) * 2).mul(8).round().div(8).to(dtype)
    batch = sampling_batch(64, True, generator)
    key, last = (x.cpu() for x in limits(*(x.cuda() for x in (logits, batch.temperature, batch.top_k, batch.top_p))))
    bits = (logits.float() + 0.0).view(torch.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = keys if dtype == torch.float32 else keys >> 16
    ids = torch.arange(logits.shape[1])
    stay = (keys > key[:, None]) | ((keys == key[:, None]) & (ids <= last[:, None]))
    greedy = batch.temperature == 0
    scaled = logits.float() / torch.where(greedy, 1.0, batch.temperature)[:, None]
    expected = filter_logits(scaled, batch.top_k, batch.top_p, greedy).isfinite()
    wrong = (stay != expected).sum(dim=1)
    assert wrong.max() <= 1, "a sum may meet the border on its other side"
    assert (wrong > 0).float().mean() < 0.1


@pytest.fixture(params=["bf16", "blockwise"])
def model(request: pytest.FixtureRequest) -> CausalLM:
    model = CausalLM(dataclasses.replace(preset("tiny", 512), num_hidden_layers=2), torch.bfloat16)
    model.init_weights(3)
    convert(model, recipe_named(request.param))
    model.to("cuda")
    refresh_weights(model)
    return model


def requests(**changes: float) -> list[Request]:
    generator = torch.Generator().manual_seed(2)
    prompts = [tuple(torch.randint(0, 500, (5 + 7 * i,), generator=generator).tolist()) for i in range(20)]
    params = [
        SamplingParams(
            temperature=0.8,
            max_new_tokens=20 + i,
            seed=i,
            ignore_eos=True,
            raw_logprobs=True,
            **(changes if i % 2 else {}),
        )
        for i in range(20)
    ]
    return [Request(prompt, each) for prompt, each in zip(prompts, params)]


def run(model: CausalLM, changes: dict[str, float] | None = None, **options: object) -> list[Completion]:
    engine = Engine(model, options=EngineOptions(**options))
    return [samples[0] for samples in engine.generate(requests(**(changes or {})))]


def plain_logprobs(model: CausalLM, completions: list[Completion], cache_dtype: str) -> list[Tensor]:
    """Of the same tokens, each behind the same ones, from passes without graphs: log-softmax at temperature 1."""
    engine = Engine(model, options=EngineOptions(decode_rounds=1, cache_dtype=cache_dtype))
    params = SamplingParams(temperature=0.0, max_new_tokens=1, ignore_eos=True, top_logprobs=512)
    wanted, found = {}, {}
    for i, (request, completion) in enumerate(zip(requests(), completions)):
        for j, token in enumerate(completion.token_ids):
            seen = request.prompt_ids + completion.token_ids[:j]
            wanted[engine.add_request(Request(seen, params), f"{i} {j}")] = token
    while engine.has_unfinished:
        found.update((event.request_id, dict(event.top)[wanted[event.request_id]]) for event in engine.step())
    return [torch.tensor([found[f"{i} {j}"] for j in range(len(c.token_ids))]) for i, c in enumerate(completions)]


@pytest.mark.parametrize("cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("changes", [{}, {"top_p": 0.8}, {"top_k": 20}], ids=str)
def test_graphs_change_nothing(model: CausalLM, changes: dict[str, float], cache_dtype: str) -> None:
    """But for roundings: sums in another order move a few bfloat16 numbers or FP8 codes to a neighbour. That moves a
    log-probability of this model by some hundredths, and so, of 512 tokens that are about equally likely, one drawn
    token in 10 to 60: how many samples are equal says nothing. What is compared is the same token behind the same ones.
    """
    plain = run(model, changes, decode_rounds=1, cache_dtype=cache_dtype)
    graphs = run(model, changes, decode_rounds=8, cache_dtype=cache_dtype)
    compared = 0
    for a, b in zip(plain, graphs):
        pairs = zip(a.token_ids, b.token_ids)
        same = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(a.token_ids))
        assert torch.allclose(torch.tensor(a.logprobs[:same]), torch.tensor(b.logprobs[:same]), atol=0.1)
        compared += same
    assert compared > 60, "of 590; the first 20 are the prompts' pass"
    differences = [
        torch.tensor(completion.raw_logprobs) - expected
        for completion, expected in zip(graphs, plain_logprobs(model, graphs, cache_dtype))
    ]
    assert torch.cat(differences).abs().max() < 0.1
    assert torch.cat(differences).square().mean().sqrt() < 0.015, "a key unseen, or another head, makes 0.02"


def test_graphs_are_deterministic(model: CausalLM) -> None:
    first, second = run(model, decode_rounds=8), run(model, decode_rounds=8)
    assert [c.token_ids for c in first] == [c.token_ids for c in second]
    assert [c.logprobs for c in first] == [c.logprobs for c in second]


def test_graphs_see_new_weights(model: CausalLM) -> None:
    engine = Engine(model, options=EngineOptions(decode_rounds=8))
    before = engine.generate(requests())
    engine.begin_update(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    refresh_weights(model)
    engine.end_update()
    after = engine.generate(requests())
    fresh = Engine(model, options=EngineOptions(decode_rounds=8)).generate(requests())
    assert [c[0].token_ids for c in after] != [c[0].token_ids for c in before]
    assert [c[0].token_ids for c in after] == [c[0].token_ids for c in fresh]


def test_sleeping_frees_the_cache_and_graphs(model: CausalLM) -> None:
    engine = Engine(model, options=EngineOptions(decode_rounds=8))
    first = engine.generate(requests())
    held = torch.cuda.memory_allocated()
    engine.sleep()
    assert torch.cuda.memory_allocated() <= held - engine.options.cache_tokens * 2 * 2 * 2
    engine.wake()
    assert [c[0].token_ids for c in engine.generate(requests())] == [c[0].token_ids for c in first]
