"""Paged attention against dense attention over each sequence on its own."""

import pytest
import torch
from tensors import relative_error
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from infir2.kernels.paged_attention import attend, write
from infir2.kernels.paged_layout import PagedCache, PagedLayout, empty_cache, query_tiles
from infir2.kernels.reference import FP8

BLOCKS, HEAD_DIM = 40, 16


def contexts(kv_heads: int, lengths: list[int], dtype: torch.dtype, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randn(2, length, kv_heads, HEAD_DIM, generator=generator).to(dtype))  # type: ignore[misc]
        for length in lengths
    ]


def tables_for(lengths: list[int], block_size: int, seed: int = 1) -> Tensor:
    """Random disjoint blocks for each sequence, padded with 0."""
    order = iter(torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(seed)).tolist())
    rows = [[next(order) for _ in range(-(-length // block_size))] for length in lengths]
    width = max(map(len, rows)) + 1
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int32)


def layout_for(tables: Tensor, lengths: list[int], queries: list[int], block_size: int) -> PagedLayout:
    slots = [
        int(tables[s, i // block_size]) * block_size + i % block_size
        for s, (length, new) in enumerate(zip(lengths, queries))
        for i in range(length - new, length)
    ]
    starts = torch.tensor([0, *queries]).cumsum(0)
    contexts = torch.tensor(lengths, dtype=torch.int32)
    decoding = next((i for i, new in enumerate(queries) if new > 1), len(queries))
    tiles = query_tiles(queries, decoding)
    return PagedLayout(torch.tensor(slots), starts.int(), contexts, tables, tiles, decoding)


def filled(cache: PagedCache, kv: list[tuple[Tensor, Tensor]], tables: Tensor, block_size: int) -> PagedCache:
    """Write all contexts whole, in one pass; the rest of the pool is NaN."""
    for pool in (cache.keys, cache.values):
        pool.view(torch.uint8).fill_(0x7F if pool.dtype == FP8 else 0xFF)
    lengths = [len(k) for k, _ in kv]
    layout = layout_for(tables, lengths, lengths, block_size)
    write(cache, torch.cat([k for k, _ in kv]), torch.cat([v for _, v in kv]), layout.slots)
    return cache


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Float64 attention of the last len(q) positions of one sequence."""
    queries, context = q.shape[0], k.shape[0]
    seen = torch.arange(context) <= torch.arange(context - queries, context)[:, None]
    q, k, v = (x.double().transpose(0, 1)[None] for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1)


LENGTHS = [1, 5, 16, 17, 33, 48, 50, 7]
QUERIES = [1, 5, 1, 17, 10, 1, 20, 1]  # decoding, whole prompts and chunks of prompts, mixed


@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_equals_dense_attention(heads: int, kv_heads: int, block_size: int) -> None:
    lengths = LENGTHS if block_size == 16 else [min(n, 20) for n in LENGTHS]
    queries = [min(n, q) for n, q in zip(lengths, QUERIES)]
    kv = contexts(kv_heads, lengths, torch.float32)
    tables = tables_for(lengths, block_size)
    cache = filled(empty_cache(BLOCKS, block_size, kv_heads, HEAD_DIM, torch.float32, "cpu"), kv, tables, block_size)
    q = torch.randn(sum(queries), heads, HEAD_DIM, generator=torch.Generator().manual_seed(2))
    out = attend(q, cache, layout_for(tables, lengths, queries, block_size))
    expected = torch.cat([dense(part, k, v) for part, (k, v) in zip(q.split(queries), kv)])
    assert (out - expected).abs().max() < 2e-6


def test_writing_in_steps_leaves_the_same_cache_as_writing_at_once() -> None:
    lengths = [19, 33]
    kv = contexts(2, lengths, torch.float32)
    tables = tables_for(lengths, 16)
    whole = filled(empty_cache(BLOCKS, 16, 2, HEAD_DIM, torch.float32, "cpu"), kv, tables, 16)
    steps = empty_cache(BLOCKS, 16, 2, HEAD_DIM, torch.float32, "cpu")
    for pool in (steps.keys, steps.values):
        pool.fill_(torch.nan)
    for start in range(0, 33, 5):
        ends = [min(length, start + 5) for length in lengths]
        new = [max(0, end - start) for end in ends]
        parts = [(k[end - n : end], v[end - n : end]) for (k, v), end, n in zip(kv, ends, new)]
        slots = layout_for(tables, ends, new, 16).slots
        write(steps, torch.cat([k for k, _ in parts]), torch.cat([v for _, v in parts]), slots)
    assert torch.equal(steps.keys.nan_to_num(), whole.keys.nan_to_num())
    assert torch.equal(steps.values.nan_to_num(), whole.values.nan_to_num())


def test_bfloat16_is_rounded_once_at_the_end() -> None:
    kv = contexts(2, LENGTHS, torch.bfloat16)
    tables = tables_for(LENGTHS, 16)
    cache = filled(empty_cache(BLOCKS, 16, 2, HEAD_DIM, torch.bfloat16, "cpu"), kv, tables, 16)
    q = torch.randn(sum(QUERIES), 4, HEAD_DIM, generator=torch.Generator().manual_seed(2)).bfloat16()
    out = attend(q, cache, layout_for(tables, LENGTHS, QUERIES, 16))
    expected = torch.cat([dense(part, k, v) for part, (k, v) in zip(q.split(QUERIES), kv)])
    assert out.dtype == torch.bfloat16
    assert (out == expected.bfloat16()).float().mean() > 0.999  # float32 sums next to a rounding border


def test_fp8_cache_costs_what_e4m3_costs() -> None:
    kv = contexts(2, LENGTHS, torch.float32)
    tables = tables_for(LENGTHS, 16)
    cache = filled(empty_cache(BLOCKS, 16, 2, HEAD_DIM, FP8, "cpu"), kv, tables, 16)
    q = torch.randn(sum(QUERIES), 4, HEAD_DIM, generator=torch.Generator().manual_seed(2))
    out = attend(q, cache, layout_for(tables, LENGTHS, QUERIES, 16))
    expected = torch.cat([dense(part, k, v) for part, (k, v) in zip(q.split(QUERIES), kv)])
    error = relative_error(out, expected)
    print(f"relative error {error:.4f}")
    assert 0.005 < error < 0.04  # E4M3 keeps 3 bits behind the leading one: 2.6 % of each element
    plain = empty_cache(BLOCKS, 16, 2, 128, torch.bfloat16, "cpu").num_bytes
    assert empty_cache(BLOCKS, 16, 2, 128, FP8, "cpu").num_bytes / plain == pytest.approx(132 / 256)


def test_a_token_of_an_fp8_cache_does_not_depend_on_its_company() -> None:
    (k, v), *_ = contexts(2, [20], torch.float32)
    k[3] *= 1e3
    together, alone = (empty_cache(2, 16, 2, HEAD_DIM, FP8, "cpu") for _ in range(2))
    slots = torch.arange(20)
    write(together, k, v, slots)
    for i in range(20):
        write(alone, k[i : i + 1], v[i : i + 1], slots[i : i + 1])
    for one, other in ((together.keys, alone.keys), (together.values, alone.values)):
        assert torch.equal(one.view(torch.uint8).flatten(0, 1)[:20], other.view(torch.uint8).flatten(0, 1)[:20])
    assert torch.equal(together.key_scale.flatten(0, 1)[:20], alone.key_scale.flatten(0, 1)[:20])


@pytest.mark.parametrize("dtype", [torch.float32, FP8])
def test_the_order_in_a_block_changes_nothing(dtype: torch.dtype) -> None:
    """As a GPU's caches lie: the tokens of a head together."""
    kv = contexts(2, LENGTHS, torch.float32)
    tables = tables_for(LENGTHS, 16)
    layout = layout_for(tables, LENGTHS, QUERIES, 16)
    q = torch.randn(sum(QUERIES), 4, HEAD_DIM, generator=torch.Generator().manual_seed(2))
    outs = []
    for heads_first in (False, True):
        cache = empty_cache(BLOCKS, 16, 2, HEAD_DIM, dtype, "cpu", heads_first=heads_first)
        assert cache.strides["HEAD_STRIDE"] == (16 if heads_first else 1)
        outs.append(attend(q, filled(cache, kv, tables, 16), layout))
    assert torch.equal(*outs)
