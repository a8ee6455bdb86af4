"""Triton kernel between projections and attention where nothing is kept; ``rotary_qkv_cache`` defines the result.

Three programs a token: queries, keys, values. A head is handled as its two halves, which rotary positions turn.
Imported only where CUDA tensors are met.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from infir2.kernels.codes_triton import codes_of, largest_bits, scale_and_reciprocal
from infir2.kernels.dependent_launch import has_dependent_launch, launch_options
from infir2.kernels.paged_layout import PagedCache


@triton.jit
def _load_heads(
    qkv_ptr, bias_ptr, start, HEADS: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr, BIAS: tl.constexpr
):
    """Both halves of some heads of a token, float32 but rounded after the bias."""
    head, d = tl.arange(0, LANES)[:, None], tl.arange(0, HALF)[None, :]
    inside, place = head < HEADS, start + head * (2 * HALF) + d
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    first = tl.load(qkv_ptr + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(qkv_ptr + place + HALF, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        first += tl.load(bias_ptr + place, mask=inside, other=0.0).to(tl.float32)
        second += tl.load(bias_ptr + place + HALF, mask=inside, other=0.0).to(tl.float32)
        first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
    return first, second


@triton.jit
def _normed(first, second, weight_ptr, eps, HALF: tl.constexpr, DTYPE: tl.constexpr):
    d = tl.arange(0, HALF)
    squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
    rstd = (1.0 / tl.sqrt_rn(squares / (2 * HALF) + eps))[:, None]
    left = tl.load(weight_ptr + d).to(DTYPE).to(tl.float32)[None, :]
    right = tl.load(weight_ptr + HALF + d).to(DTYPE).to(tl.float32)[None, :]
    first = (left * (first * rstd).to(DTYPE).to(tl.float32)).to(DTYPE).to(tl.float32)
    second = (right * (second * rstd).to(DTYPE).to(tl.float32)).to(DTYPE).to(tl.float32)
    return first, second


@triton.jit
def _store_heads(
    first, second, pool_ptr, scale_ptr, row, HEADS: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr,
    HEAD_STRIDE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Heads of a token into the rows of a pool that start at ``row``; FP8: as codes, and their scales."""
    head, d = tl.arange(0, LANES), tl.arange(0, HALF)
    inside = head < HEADS
    row += head * HEAD_STRIDE
    place = pool_ptr + row[:, None] * (2 * HALF) + d[None, :]
    if FP8:
        scale, factor = scale_and_reciprocal(tl.maximum(largest_bits(first), largest_bits(second)))
        first, second = codes_of(first, factor), codes_of(second, factor)
        tl.store(scale_ptr + row, scale, mask=inside)
    dtype: tl.constexpr = pool_ptr.dtype.element_ty
    tl.store(place, first.to(dtype), mask=inside[:, None])
    tl.store(place + HALF, second.to(dtype), mask=inside[:, None])


@triton.jit
def _place(
    qkv_ptr, bias_ptr, start, weight_ptr, cos_ptr, sin_ptr, pool_ptr, scale_ptr, row, token, eps,
    HEADS: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr, HEAD_STRIDE: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, TURN: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """The queries, the keys or the values of a token."""
    first, second = _load_heads(qkv_ptr, bias_ptr, start, HEADS, HALF, LANES, BIAS)
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    if NORM:
        first, second = _normed(first, second, weight_ptr, eps, HALF, dtype)
    if TURN:
        d = tl.arange(0, HALF)
        cos, sin = tl.load(cos_ptr + token * HALF + d)[None, :], tl.load(sin_ptr + token * HALF + d)[None, :]
        first, second = first * cos - second * sin, second * cos + first * sin
        first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
    _store_heads(first, second, pool_ptr, scale_ptr, row, HEADS, HALF, LANES, HEAD_STRIDE, FP8)


@triton.jit
def _rotate_qkv_into_cache_kernel(
    qkv_ptr, bias_ptr, query_weight_ptr, key_weight_ptr, cos_ptr, sin_ptr, q_ptr,
    key_pool_ptr, value_pool_ptr, key_scale_ptr, value_scale_ptr, slots_ptr, stride, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr, KV_LANES: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_STRIDE: tl.constexpr, TOKEN_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, FP8: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    token, which = tl.program_id(0).to(tl.int64), tl.program_id(1)
    qkv = qkv_ptr + token * stride
    keys: tl.constexpr = HEADS * 2 * HALF
    values: tl.constexpr = keys + KV_HEADS * 2 * HALF
    slot = tl.load(slots_ptr + token)
    row = slot // BLOCK * BLOCK_STRIDE + slot % BLOCK * TOKEN_STRIDE
    if which == 0:
        _place(
            qkv, bias_ptr, 0, query_weight_ptr, cos_ptr, sin_ptr, q_ptr, q_ptr, token * HEADS, token, eps,
            HEADS, HALF, LANES, 1, BIAS, NORM, True, False,
        )  # fmt: skip
    elif which == 1:
        _place(
            qkv, bias_ptr, keys, key_weight_ptr, cos_ptr, sin_ptr, key_pool_ptr, key_scale_ptr, row, token, eps,
            KV_HEADS, HALF, KV_LANES, HEAD_STRIDE, BIAS, NORM, True, FP8,
        )  # fmt: skip
    else:
        _place(
            qkv, bias_ptr, values, key_weight_ptr, cos_ptr, sin_ptr, value_pool_ptr, value_scale_ptr, row, token, eps,
            KV_HEADS, HALF, KV_LANES, HEAD_STRIDE, BIAS, False, False, FP8,
        )  # fmt: skip


def rotate_qkv_into_cache(
    qkv: Tensor, bias: Tensor | None, norms: tuple[Tensor, Tensor, float] | None, cos: Tensor, sin: Tensor,
    cache: PagedCache, slots: Tensor,
) -> Tensor:  # fmt: skip
    """See ``rotary_qkv_cache.rotate_qkv_into_cache``."""
    tokens, (kv_heads, head_dim) = slots.numel(), cache.keys.shape[2:]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    q = torch.empty(tokens, heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    query_weight, key_weight, eps = norms or (qkv, qkv, 0.0)
    dependent = has_dependent_launch(qkv.device)
    _rotate_qkv_into_cache_kernel[(tokens, 3)](
        qkv, qkv if bias is None else bias, query_weight, key_weight, cos, sin, q, *cache.pools(), slots,
        qkv.stride(0), eps, HEADS=heads, KV_HEADS=kv_heads, HALF=head_dim // 2, LANES=triton.next_power_of_2(heads),
        KV_LANES=triton.next_power_of_2(kv_heads), BLOCK=cache.keys.shape[1], **cache.strides,
        BIAS=bias is not None, NORM=norms is not None, FP8=cache.key_scale is not None, DEPENDENT=dependent,
        num_warps=4, **launch_options(dependent),
    )  # fmt: skip
    return q
