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
from infir2.model.presets import preset
from infir2.model.transformer import CausalLM
from infir2.rollout.engine import Engine
from infir2.rollout.options import EngineOptions
from infir2.rollout.records import Completion, Request, SamplingParams
from infir2.rollout.sampler import SamplingBatch, sample

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_drawing_equals_its_twin(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(300, 151_936, generator=generator) * 3).to(dtype)
    temperature = torch.rand(300, generator=generator) * 1.5
    temperature[::7] = 0.0
    keys = torch.randint(-(2**62), 2**62, (300,), generator=generator)
    batch = SamplingBatch(
        temperature, torch.zeros(300, dtype=torch.int64), torch.ones(300).double(), keys, torch.arange(300), False
    )
    expected = sample(logits, batch)
    fields = {name: value.cuda() for name, value in vars(batch).items() if isinstance(value, Tensor)}
    got = sample(logits.cuda(), dataclasses.replace(batch, **fields))
    same = got.tokens.cpu() == expected.tokens
    assert same.float().mean() > 0.98, "sums in another order move a token only where the number meets its border"
    assert torch.allclose(got.logprobs.cpu()[same], expected.logprobs[same], atol=1e-4)
    assert torch.allclose(got.raw_logprobs.cpu()[same], expected.raw_logprobs[same], atol=1e-4)


@pytest.fixture(params=["bf16", "blockwise"])
def model(request: pytest.FixtureRequest) -> CausalLM:
    model = CausalLM(dataclasses.replace(preset("tiny", 512), num_hidden_layers=2), torch.bfloat16)
    model.init_weights(3)
    convert(model, recipe_named(request.param))
    model.to("cuda")
    refresh_weights(model)
    return model


def requests() -> list[Request]:
    generator = torch.Generator().manual_seed(2)
    prompts = [tuple(torch.randint(0, 500, (5 + 7 * i,), generator=generator).tolist()) for i in range(20)]
    return [
        Request(prompt, SamplingParams(temperature=0.8, max_new_tokens=20 + i, seed=i, ignore_eos=True))
        for i, prompt in enumerate(prompts)
    ]


def run(model: CausalLM, **options: int) -> list[Completion]:
    return [samples[0] for samples in Engine(model, options=EngineOptions(**options)).generate(requests())]


def test_graphs_change_nothing(model: CausalLM) -> None:
    plain, graphs = run(model, decode_rounds=1), run(model, decode_rounds=8)
    equal = sum(a.token_ids == b.token_ids for a, b in zip(plain, graphs))
    assert equal >= 17, "rows of another shape may round apart; most samples stay the same"
    for a, b in zip(plain, graphs):
        if a.token_ids == b.token_ids:
            assert torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=0.05)


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
