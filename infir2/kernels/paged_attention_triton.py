"""Triton kernels of paged attention; ``paged_attention`` defines the result. Imported only where CUDA tensors are met.

Here is what writes the cache, and attention for prompts, which is bound by arithmetic: a program takes a tile of one
sequence's queries and one query head. Products are made in the dtype of q (an FP8 cache's codes are exact in it) with
float32 sums; softmax weights are rounded to that dtype before they meet the values. For sequences that decode see
``paged_decode_triton``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infir2.kernels.codes_triton import encode
from infir2.kernels.paged_decode_triton import decode, softmax_scale
from infir2.kernels.paged_layout import QUERY_TILE, PagedCache, PagedLayout

# Shapes of the prompts' kernel in half precision, and in float32.
_PROMPT = {"QUERIES": 128, "KEYS": 64, "num_warps": 8, "num_stages": 3}
_PROMPT_WIDE = {"QUERIES": 32, "KEYS": 32, "num_warps": 4, "num_stages": 2}


@triton.jit
def _write_heads(
    new_ptr, pool_ptr, scale_ptr, row, head_stride,
    KV_HEADS: tl.constexpr, LANES: tl.constexpr, HEAD: tl.constexpr, HEAD_STRIDE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Keys or values of one token, the first head of which belongs in that row of the pool."""
    head, d = tl.arange(0, LANES), tl.arange(0, HEAD)
    inside = head < KV_HEADS
    row += head * HEAD_STRIDE
    x = tl.load(new_ptr + head[:, None] * head_stride + d[None, :], mask=inside[:, None], other=0.0)
    place = pool_ptr + row[:, None] * HEAD + d[None, :]
    if FP8:
        codes, scale = encode(x.to(tl.float32))
        tl.store(place, codes, mask=inside[:, None])
        tl.store(scale_ptr + row, scale, mask=inside)
    else:
        tl.store(place, x.to(pool_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _write_kernel(
    keys_ptr, values_ptr, key_pool_ptr, value_pool_ptr, key_scale_ptr, value_scale_ptr, slots_ptr,
    key_stride, value_stride, key_head_stride, value_head_stride,
    KV_HEADS: tl.constexpr, LANES: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr, TOKEN_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    row = slot // BLOCK * BLOCK_STRIDE + slot % BLOCK * TOKEN_STRIDE
    keys, values = keys_ptr + token * key_stride, values_ptr + token * value_stride
    _write_heads(keys, key_pool_ptr, key_scale_ptr, row, key_head_stride, KV_HEADS, LANES, HEAD, HEAD_STRIDE, FP8)
    _write_heads(
        values, value_pool_ptr, value_scale_ptr, row, value_head_stride, KV_HEADS, LANES, HEAD, HEAD_STRIDE, FP8
    )


@triton.jit
def _load_rows(
    pool_ptr, scale_ptr, table_ptr, position, end, head,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_STRIDE: tl.constexpr, TOKEN_STRIDE: tl.constexpr,
    DTYPE: tl.constexpr, FP8: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys or values at some positions of a sequence: [positions, HEAD], and their scales. ``head`` is the row at which
    the head starts in a block."""
    d = tl.arange(0, HEAD)
    if MASKED:
        inside = position < end
        block = tl.load(table_ptr + position // BLOCK, mask=inside, other=0)
        row = block.to(tl.int64) * BLOCK_STRIDE + position % BLOCK * TOKEN_STRIDE + head
        x = tl.load(pool_ptr + row[:, None] * HEAD + d[None, :], mask=inside[:, None], other=0.0)
        scale = tl.load(scale_ptr + row, mask=inside, other=0.0) if FP8 else tl.full(position.shape, 1.0, tl.float32)
    else:
        block = tl.load(table_ptr + position // BLOCK)
        row = block.to(tl.int64) * BLOCK_STRIDE + position % BLOCK * TOKEN_STRIDE + head
        x = tl.load(pool_ptr + row[:, None] * HEAD + d[None, :])
        scale = tl.load(scale_ptr + row) if FP8 else tl.full(position.shape, 1.0, tl.float32)
    return x.to(DTYPE), scale


@triton.jit
def _absorb(
    q, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, table, first, end, place, head, softmax_scale,
    top, total, mixed,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_STRIDE: tl.constexpr, TOKEN_STRIDE: tl.constexpr,
    KEYS: tl.constexpr, FP8: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys and values into the running softmax: largest score, sum of weights, weighted values.

    ``place`` holds the queries' own positions: where MASKED, a query sees no key behind its own, nor behind ``end``.
    """
    position = first + tl.arange(0, KEYS)
    k, k_scale = _load_rows(
        keys_ptr, key_scale_ptr, table, position, end, head,
        HEAD, BLOCK, BLOCK_STRIDE, TOKEN_STRIDE, q.dtype, FP8, MASKED,
    )  # fmt: skip
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * softmax_scale * k_scale[None, :]
    if MASKED:
        seen = (position < end)[None, :] & (position[None, :] <= place[:, None])
        scores = tl.where(seen, scores, -float("inf"))
    higher = tl.maximum(top, tl.max(scores, axis=1))
    weights, shrink = tl.exp2(scores - higher[:, None]), tl.exp2(top - higher)
    v, v_scale = _load_rows(
        values_ptr, value_scale_ptr, table, position, end, head,
        HEAD, BLOCK, BLOCK_STRIDE, TOKEN_STRIDE, q.dtype, FP8, MASKED,
    )  # fmt: skip
    mixed = mixed * shrink[:, None] + tl.dot((weights * v_scale[None, :]).to(q.dtype), v, input_precision="ieee")
    return higher, total * shrink + tl.sum(weights, axis=1), mixed


@triton.jit(do_not_specialize=["table_stride"])
def _prompt_kernel(
    q_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr,
    tiles_ptr, starts_ptr, contexts_ptr, tables_ptr, out_ptr, q_stride, table_stride, softmax_scale,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr, TOKEN_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr,
    SPLIT: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    query_head, tile = tl.program_id(0), tl.program_id(1)
    head = query_head // GROUP * HEAD_STRIDE
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
            top, total, mixed, HEAD, BLOCK, BLOCK_STRIDE, TOKEN_STRIDE, KEYS, FP8, False,
        )  # fmt: skip
    for first in range(everybodys, end, KEYS):
        top, total, mixed = _absorb(
            q, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, table, first, end, place, head, softmax_scale,
            top, total, mixed, HEAD, BLOCK, BLOCK_STRIDE, TOKEN_STRIDE, KEYS, FP8, True,
        )  # fmt: skip
    out = out_ptr + rows[:, None] * (KV_HEADS * GROUP * HEAD) + query_head * HEAD + d[None, :]
    tl.store(out, (mixed / total[:, None]).to(out_ptr.dtype.element_ty), mask=mine[:, None])


def write(cache: PagedCache, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """See ``paged_attention.write``."""
    tokens, kv_heads, head_dim = keys.shape
    _write_kernel[(tokens,)](
        keys, values, *cache.pools(), slots, keys.stride(0), values.stride(0), keys.stride(1), values.stride(1),
        KV_HEADS=kv_heads, LANES=triton.next_power_of_2(kv_heads), HEAD=head_dim, BLOCK=cache.keys.shape[1],
        **cache.strides, FP8=cache.key_scale is not None,
        num_warps=min(4, triton.next_power_of_2(triton.cdiv(kv_heads * head_dim, 256))),
    )  # fmt: skip


def attend(q: Tensor, cache: PagedCache, layout: PagedLayout) -> Tensor:
    """See ``paged_attention.attend``."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if layout.decoding:
        decode(q[: layout.decoding], cache, layout, out)
    if layout.query_tiles.shape[0]:
        _prompt(q, cache, layout, out)
    return out


def _prompt(q: Tensor, cache: PagedCache, layout: PagedLayout, out: Tensor) -> None:
    heads, head_dim = q.shape[1:]
    block_size, kv_heads = cache.keys.shape[1:3]
    shape = _PROMPT if q.element_size() == 2 else _PROMPT_WIDE
    split = QUERY_TILE // shape["QUERIES"]
    _prompt_kernel[(heads, layout.query_tiles.shape[0] * split)](
        q, *cache.pools(), layout.query_tiles, layout.query_starts, layout.context_lengths, layout.block_tables,
        out, q.stride(0), layout.block_tables.stride(0), softmax_scale(head_dim),
        GROUP=heads // kv_heads, KV_HEADS=kv_heads, HEAD=head_dim, BLOCK=block_size,
        **cache.strides, FP8=cache.key_scale is not None, SPLIT=split, **shape,
    )  # fmt: skip
