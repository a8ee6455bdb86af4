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

_KEYS = 64  # keys of a tile
_PROGRAMS = 1024  # that decoding should have at least, so that the whole device reads
_LOG2E = 1.4426950408889634


@triton.jit
def _write_kernel(
    new_ptr, pool_ptr, scale_ptr, slots_ptr, token_stride, head_stride,
    KV_HEADS: tl.constexpr, HEAD: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, HEAD)
    row = tl.load(slots_ptr + token) * KV_HEADS + head
    x = tl.load(new_ptr + token.to(tl.int64) * token_stride + head * head_stride + d)
    if FP8:
        value = x.to(tl.float32)
        bits = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
        scale = _scale_from_bits(bits, True)
        finite = bits < 0x7F800000
        reciprocal = (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
        codes = tl.where(finite, value * tl.where(finite, reciprocal, 0.0), 0.0).to(tl.float8e4nv)
        tl.store(pool_ptr + row * HEAD + d, codes)
        tl.store(scale_ptr + row, scale)
    else:
        tl.store(pool_ptr + row * HEAD + d, x.to(pool_ptr.dtype.element_ty))


@triton.jit
def _load_rows(
    pool_ptr, scale_ptr, table_ptr, position, inside, head,
    KV_HEADS: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Keys or values of one head at some positions of a sequence: [positions, HEAD], and their scales."""
    block = tl.load(table_ptr + position // BLOCK, mask=inside, other=0)
    row = (block.to(tl.int64) * BLOCK + position % BLOCK) * KV_HEADS + head
    d = tl.arange(0, HEAD)
    x = tl.load(pool_ptr + row[:, None] * HEAD + d[None, :], mask=inside[:, None], other=0.0).to(DTYPE)
    scale = tl.load(scale_ptr + row, mask=inside, other=0.0) if FP8 else tl.full(position.shape, 1.0, tl.float32)
    return x, scale


@triton.jit
def _absorb(
    q, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, table, position, inside, seen, head, softmax_scale,
    top, total, mixed,
    KV_HEADS: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """One tile of keys and values into the running softmax: largest score, sum of weights, weighted values."""
    k, k_scale = _load_rows(keys_ptr, key_scale_ptr, table, position, inside, head, KV_HEADS, HEAD, BLOCK, q.dtype, FP8)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * softmax_scale
    scores = tl.where(seen, scores * k_scale[None, :], -float("inf"))
    higher = tl.maximum(top, tl.max(scores, axis=1))
    weights, shrink = tl.exp2(scores - higher[:, None]), tl.exp2(top - higher)
    v, v_scale = _load_rows(
        values_ptr, value_scale_ptr, table, position, inside, head, KV_HEADS, HEAD, BLOCK, q.dtype, FP8
    )
    mixed = mixed * shrink[:, None] + tl.dot((weights * v_scale[None, :]).to(q.dtype), v, input_precision="ieee")
    return higher, total * shrink + tl.sum(weights, axis=1), mixed


@triton.jit
def _decode_kernel(
    q_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, tables_ptr, contexts_ptr, parts_ptr, lse_ptr,
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
    for first in range(start, end, KEYS):
        position = first + tl.arange(0, KEYS)
        inside = position < end
        top, total, mixed = _absorb(
            q, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, table, position, inside, inside[None, :], head,
            softmax_scale, top, total, mixed, KV_HEADS, HEAD, BLOCK, FP8,
        )  # fmt: skip
    found = total > 0  # a part may lie behind the context's end
    row = (sequence.to(tl.int64) * KV_HEADS * GROUP + query) * PARTS + part
    out = tl.where(found[:, None], mixed / tl.where(found, total, 1.0)[:, None], 0.0)
    tl.store(parts_ptr + row[:, None] * HEAD + d[None, :], out, mask=(lane < GROUP)[:, None])
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


@triton.jit
def _prompt_kernel(
    q_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr,
    tiles_ptr, starts_ptr, contexts_ptr, tables_ptr, out_ptr, q_stride, table_stride, softmax_scale,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    tile, query_head = tl.program_id(0), tl.program_id(1)
    head = query_head // GROUP
    sequence, offset = tl.load(tiles_ptr + 2 * tile), tl.load(tiles_ptr + 2 * tile + 1)
    start, stop = tl.load(starts_ptr + sequence), tl.load(starts_ptr + sequence + 1)
    context = tl.load(contexts_ptr + sequence)
    number, d = offset + tl.arange(0, QUERIES), tl.arange(0, HEAD)
    mine = number < stop - start
    rows = (start + number).to(tl.int64)
    q = tl.load(q_ptr + rows[:, None] * q_stride + query_head * HEAD + d[None, :], mask=mine[:, None], other=0.0)
    place = context - (stop - start) + number  # each query's own position
    end = tl.minimum(context - (stop - start) + offset + QUERIES, context)
    table = tables_ptr + sequence.to(tl.int64) * table_stride
    top = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, HEAD], tl.float32)
    for first in range(0, end, KEYS):
        position = first + tl.arange(0, KEYS)
        inside = position < end
        seen = inside[None, :] & (position[None, :] <= place[:, None])  # position 0 is seen by all
        top, total, mixed = _absorb(
            q, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, table, position, inside, seen, head,
            softmax_scale, top, total, mixed, KV_HEADS, HEAD, BLOCK, FP8,
        )  # fmt: skip
    out = out_ptr + rows[:, None] * (KV_HEADS * GROUP * HEAD) + query_head * HEAD + d[None, :]
    tl.store(out, (mixed / total[:, None]).to(out_ptr.dtype.element_ty), mask=mine[:, None])


def write(cache: PagedCache, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """See ``paged_attention.write``."""
    tokens, kv_heads, head_dim = keys.shape
    for pool, scale, new in ((cache.keys, cache.key_scale, keys), (cache.values, cache.value_scale, values)):
        _write_kernel[(tokens, kv_heads)](
            new, pool, pool if scale is None else scale, slots, new.stride(0), new.stride(1),
            KV_HEADS=kv_heads, HEAD=head_dim, FP8=scale is not None, num_warps=1,
        )  # fmt: skip


def attend(q: Tensor, cache: PagedCache, layout: PagedLayout) -> Tensor:
    """See ``paged_attention.attend``."""
    return _decode(q, cache, layout) if layout.decoding else _prompt(q, cache, layout)


def _decode(q: Tensor, cache: PagedCache, layout: PagedLayout) -> Tensor:
    sequences, heads, head_dim = q.shape
    block_size, kv_heads = cache.keys.shape[1:3]
    group = heads // kv_heads
    parts = min(32, triton.next_power_of_2(triton.cdiv(_PROGRAMS, sequences * kv_heads)))
    mixed = torch.empty(sequences, heads, parts, head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(sequences, heads, parts, dtype=torch.float32, device=q.device)
    _decode_kernel[(sequences, kv_heads, parts)](
        q, *_pools(cache), layout.block_tables, layout.context_lengths, mixed, lse,
        q.stride(0), layout.block_tables.stride(0), head_dim**-0.5 * _LOG2E,
        GROUP=group, LANES=max(16, triton.next_power_of_2(group)), KV_HEADS=kv_heads, HEAD=head_dim, BLOCK=block_size,
        PARTS=parts, KEYS=_KEYS, FP8=cache.key_scale is not None, num_warps=4, num_stages=3,
    )  # fmt: skip
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _join_kernel[(sequences * heads,)](mixed, lse, out, PARTS=parts, HEAD=head_dim, num_warps=1)
    return out


def _prompt(q: Tensor, cache: PagedCache, layout: PagedLayout) -> Tensor:
    heads, head_dim = q.shape[1:]
    block_size, kv_heads = cache.keys.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _prompt_kernel[(layout.query_tiles.shape[0], heads)](
        q, *_pools(cache), layout.query_tiles, layout.query_starts, layout.context_lengths, layout.block_tables, out,
        q.stride(0), layout.block_tables.stride(0), head_dim**-0.5 * _LOG2E,
        GROUP=heads // kv_heads, KV_HEADS=kv_heads, HEAD=head_dim, BLOCK=block_size,
        QUERIES=QUERY_TILE, KEYS=_KEYS, FP8=cache.key_scale is not None, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


def _pools(cache: PagedCache) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values and their scales; where there are none, something in their place that is never read."""
    if cache.key_scale is None or cache.value_scale is None:
        return cache.keys, cache.values, cache.keys, cache.values
    return cache.keys, cache.values, cache.key_scale, cache.value_scale
