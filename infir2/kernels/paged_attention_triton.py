"""Triton kernels of paged attention; ``paged_attention`` defines the result. Imported only where CUDA tensors are met.

Decoding is bound by reading the cache: a program takes one sequence, one key-value head with all query heads that
share it, and a part of the context; ``_join_kernel`` puts the parts together. Prompts are bound by arithmetic: a
program takes a tile of one sequence's queries and one query head. Products are made in the dtype of q (an FP8 cache's
codes are exact in it) with float32 sums; softmax weights are rounded to that dtype before they meet the values.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infir2.kernels.paged_layout import QUERY_TILE, PagedCache, PagedLayout
from infir2.kernels.quantize_triton import _scale_from_bits

_PROGRAMS = 1024  # that decoding should have at least, so that the whole device reads
_LOG2E = 1.4426950408889634
# Shapes of the kernels: decoding; prompts in half precision, in float32.
_DECODE = {"KEYS": 64, "num_warps": 4, "num_stages": 3}
_PROMPT = {"QUERIES": 128, "KEYS": 64, "num_warps": 8, "num_stages": 3}
_PROMPT_WIDE = {"QUERIES": 32, "KEYS": 32, "num_warps": 4, "num_stages": 2}


@triton.jit
def _write_heads(
    new_ptr, pool_ptr, scale_ptr, slot, head_stride,
    KV_HEADS: tl.constexpr, LANES: tl.constexpr, HEAD: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Keys or values of one token."""
    head, d = tl.arange(0, LANES), tl.arange(0, HEAD)
    inside = head < KV_HEADS
    row = slot * KV_HEADS + head
    x = tl.load(new_ptr + head[:, None] * head_stride + d[None, :], mask=inside[:, None], other=0.0)
    place = pool_ptr + row[:, None] * HEAD + d[None, :]
    if FP8:
        value = x.to(tl.float32)
        bits = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
        scale = _scale_from_bits(bits, True)
        finite = bits < 0x7F800000
        reciprocal = (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
        scaled = tl.where(finite[:, None], value * tl.where(finite, reciprocal, 0.0)[:, None], 0.0)
        tl.store(place, scaled.to(tl.float8e4nv), mask=inside[:, None])
        tl.store(scale_ptr + row, scale, mask=inside)
    else:
        tl.store(place, x.to(pool_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _write_kernel(
    keys_ptr, values_ptr, key_pool_ptr, value_pool_ptr, key_scale_ptr, value_scale_ptr, slots_ptr,
    key_stride, value_stride, key_head_stride, value_head_stride,
    KV_HEADS: tl.constexpr, LANES: tl.constexpr, HEAD: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    keys, values = keys_ptr + token * key_stride, values_ptr + token * value_stride
    _write_heads(keys, key_pool_ptr, key_scale_ptr, slot, key_head_stride, KV_HEADS, LANES, HEAD, FP8)
    _write_heads(values, value_pool_ptr, value_scale_ptr, slot, value_head_stride, KV_HEADS, LANES, HEAD, FP8)


@triton.jit
def _load_rows(
    pool_ptr, scale_ptr, table_ptr, position, end, head,
    KV_HEADS: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, FP8: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Keys or values of one head at some positions of a sequence: [positions, HEAD], and their scales."""
    d = tl.arange(0, HEAD)
    if MASKED:
        inside = position < end
        block = tl.load(table_ptr + position // BLOCK, mask=inside, other=0)
        row = (block.to(tl.int64) * BLOCK + position % BLOCK) * KV_HEADS + head
        x = tl.load(pool_ptr + row[:, None] * HEAD + d[None, :], mask=inside[:, None], other=0.0)
        scale = tl.load(scale_ptr + row, mask=inside, other=0.0) if FP8 else tl.full(position.shape, 1.0, tl.float32)
    else:
        block = tl.load(table_ptr + position // BLOCK)
        row = (block.to(tl.int64) * BLOCK + position % BLOCK) * KV_HEADS + head
        x = tl.load(pool_ptr + row[:, None] * HEAD + d[None, :])
        scale = tl.load(scale_ptr + row) if FP8 else tl.full(position.shape, 1.0, tl.float32)
    return x.to(DTYPE), scale


@triton.jit
def _absorb(
    q, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, table, first, end, place, head, softmax_scale,
    top, total, mixed,
    KV_HEADS: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, FP8: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys and values into the running softmax: largest score, sum of weights, weighted values.

    ``place`` holds the queries' own positions: where MASKED, a query sees no key behind its own, nor behind ``end``.
    """
    position = first + tl.arange(0, KEYS)
    k, k_scale = _load_rows(
        keys_ptr, key_scale_ptr, table, position, end, head, KV_HEADS, HEAD, BLOCK, q.dtype, FP8, MASKED
    )
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * softmax_scale * k_scale[None, :]
    if MASKED:
        seen = (position < end)[None, :] & (position[None, :] <= place[:, None])
        scores = tl.where(seen, scores, -float("inf"))
    higher = tl.maximum(top, tl.max(scores, axis=1))
    weights, shrink = tl.exp2(scores - higher[:, None]), tl.exp2(top - higher)
    v, v_scale = _load_rows(
        values_ptr, value_scale_ptr, table, position, end, head, KV_HEADS, HEAD, BLOCK, q.dtype, FP8, MASKED
    )
    mixed = mixed * shrink[:, None] + tl.dot((weights * v_scale[None, :]).to(q.dtype), v, input_precision="ieee")
    return higher, total * shrink + tl.sum(weights, axis=1), mixed


@triton.jit(do_not_specialize=["table_stride"])
def _decode_kernel(
    q_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, tables_ptr, contexts_ptr, out_ptr, lse_ptr,
    q_stride, table_stride, softmax_scale,
    GROUP: tl.constexpr, LANES: tl.constexpr, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr,
    PARTS: tl.constexpr, KEYS: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    sequence, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context = tl.load(contexts_ptr + sequence)
    length = tl.cdiv(tl.cdiv(context, PARTS), KEYS) * KEYS
    start, end = part * length, tl.minimum((part + 1) * length, context)
    lane, d = tl.arange(0, LANES), tl.arange(0, HEAD)
    query = head * GROUP + lane
    q_rows = q_ptr + sequence.to(tl.int64) * q_stride + query[:, None] * HEAD + d[None, :]
    q = tl.load(q_rows, mask=(lane < GROUP)[:, None], other=0.0)
    table = tables_ptr + sequence.to(tl.int64) * table_stride
    top = tl.full([LANES], -float("inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    mixed = tl.zeros([LANES, HEAD], tl.float32)
    place = tl.full([LANES], context, tl.int32)
    for first in range(start, end, KEYS):
        top, total, mixed = _absorb(
            q, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, table, first, end, place, head, softmax_scale,
            top, total, mixed, KV_HEADS, HEAD, BLOCK, KEYS, FP8, True,
        )  # fmt: skip
    found = total > 0  # a part may lie behind the context's end
    row = (sequence.to(tl.int64) * KV_HEADS * GROUP + query) * PARTS + part
    out = tl.where(found[:, None], mixed / tl.where(found, total, 1.0)[:, None], 0.0)
    out_rows = out_ptr + row[:, None] * HEAD + d[None, :]
    tl.store(out_rows, out.to(out_ptr.dtype.element_ty), mask=(lane < GROUP)[:, None])
    if PARTS > 1:
        tl.store(lse_ptr + row, tl.where(found, top + tl.log2(total), -float("inf")), mask=lane < GROUP)


@triton.jit
def _join_kernel(parts_ptr, lse_ptr, out_ptr, PARTS: tl.constexpr, HEAD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part, d = tl.arange(0, PARTS), tl.arange(0, HEAD)
    lse = tl.load(lse_ptr + row * PARTS + part)
    weights = tl.exp2(lse - tl.max(lse, axis=0))
    parts = tl.load(parts_ptr + (row * PARTS + part)[:, None] * HEAD + d[None, :])
    out = tl.sum(parts * (weights / tl.sum(weights, axis=0))[:, None], axis=0)
    tl.store(out_ptr + row * HEAD + d, out.to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["table_stride"])
def _prompt_kernel(
    q_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr,
    tiles_ptr, starts_ptr, contexts_ptr, tables_ptr, out_ptr, q_stride, table_stride, softmax_scale,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr,
    SPLIT: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    query_head, tile = tl.program_id(0), tl.program_id(1)
    head = query_head // GROUP
    sequence = tl.load(tiles_ptr + 2 * (tile // SPLIT))
    offset = tl.load(tiles_ptr + 2 * (tile // SPLIT) + 1) + tile % SPLIT * QUERIES
    start, stop = tl.load(starts_ptr + sequence), tl.load(starts_ptr + sequence + 1)
    context = tl.load(contexts_ptr + sequence)
    number, d = offset + tl.arange(0, QUERIES), tl.arange(0, HEAD)
    mine = number < stop - start
    if offset >= stop - start:
        return
    rows = (start + number).to(tl.int64)
    q = tl.load(q_ptr + rows[:, None] * q_stride + query_head * HEAD + d[None, :], mask=mine[:, None], other=0.0)
    place = context - (stop - start) + number  # each query's own position
    end = tl.minimum(context - (stop - start) + offset + QUERIES, context)
    table = tables_ptr + sequence.to(tl.int64) * table_stride
    top = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, HEAD], tl.float32)
    everybodys = (context - (stop - start) + offset + 1) // KEYS * KEYS  # keys that the tile's first query sees
    for first in range(0, everybodys, KEYS):
        top, total, mixed = _absorb(
            q, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, table, first, end, place, head, softmax_scale,
            top, total, mixed, KV_HEADS, HEAD, BLOCK, KEYS, FP8, False,
        )  # fmt: skip
    for first in range(everybodys, end, KEYS):
        top, total, mixed = _absorb(
            q, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, table, first, end, place, head, softmax_scale,
            top, total, mixed, KV_HEADS, HEAD, BLOCK, KEYS, FP8, True,
        )  # fmt: skip
    out = out_ptr + rows[:, None] * (KV_HEADS * GROUP * HEAD) + query_head * HEAD + d[None, :]
    tl.store(out, (mixed / total[:, None]).to(out_ptr.dtype.element_ty), mask=mine[:, None])


def write(cache: PagedCache, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """See ``paged_attention.write``."""
    tokens, kv_heads, head_dim = keys.shape
    _write_kernel[(tokens,)](
        keys, values, *_pools(cache), slots, keys.stride(0), values.stride(0), keys.stride(1), values.stride(1),
        KV_HEADS=kv_heads, LANES=triton.next_power_of_2(kv_heads), HEAD=head_dim, FP8=cache.key_scale is not None,
        num_warps=min(4, triton.next_power_of_2(triton.cdiv(kv_heads * head_dim, 256))),
    )  # fmt: skip


def attend(q: Tensor, cache: PagedCache, layout: PagedLayout) -> Tensor:
    """See ``paged_attention.attend``."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if layout.decoding:
        _decode(q[: layout.decoding], cache, layout, out)
    if layout.query_tiles.shape[0]:
        _prompt(q, cache, layout, out)
    return out


def _decode(q: Tensor, cache: PagedCache, layout: PagedLayout, out: Tensor) -> None:
    sequences, heads, head_dim = q.shape
    block_size, kv_heads = cache.keys.shape[1:3]
    group = heads // kv_heads
    parts = min(32, triton.next_power_of_2(triton.cdiv(_PROGRAMS, sequences * kv_heads)))
    mixed, lse = out, out  # one part is the whole
    if parts > 1:
        mixed = torch.empty(sequences, heads, parts, head_dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(sequences, heads, parts, dtype=torch.float32, device=q.device)
    _decode_kernel[(sequences, kv_heads, parts)](
        q, *_pools(cache), layout.block_tables, layout.context_lengths, mixed, lse,
        q.stride(0), layout.block_tables.stride(0), head_dim**-0.5 * _LOG2E,
        GROUP=group, LANES=max(16, triton.next_power_of_2(group)), KV_HEADS=kv_heads, HEAD=head_dim, BLOCK=block_size,
        PARTS=parts, FP8=cache.key_scale is not None, **_DECODE,
    )  # fmt: skip
    if parts > 1:
        _join_kernel[(sequences * heads,)](mixed, lse, out, PARTS=parts, HEAD=head_dim, num_warps=1)


def _prompt(q: Tensor, cache: PagedCache, layout: PagedLayout, out: Tensor) -> None:
    heads, head_dim = q.shape[1:]
    block_size, kv_heads = cache.keys.shape[1:3]
    shape = _PROMPT if q.element_size() == 2 else _PROMPT_WIDE
    split = QUERY_TILE // shape["QUERIES"]
    _prompt_kernel[(heads, layout.query_tiles.shape[0] * split)](
        q, *_pools(cache), layout.query_tiles, layout.query_starts, layout.context_lengths, layout.block_tables, out,
        q.stride(0), layout.block_tables.stride(0), head_dim**-0.5 * _LOG2E,
        GROUP=heads // kv_heads, KV_HEADS=kv_heads, HEAD=head_dim, BLOCK=block_size,
        FP8=cache.key_scale is not None, SPLIT=split, **shape,
    )  # fmt: skip


def _pools(cache: PagedCache) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values and their scales; where there are none, something in their place that is never touched."""
    if cache.key_scale is None or cache.value_scale is None:
        return cache.keys, cache.values, cache.keys, cache.values
    return cache.keys, cache.values, cache.key_scale, cache.value_scale
