"""Triton kernel of rotary positions, where no gradient is wanted; ``rotary`` defines the result.

A program takes all heads of a token. Imported only where CUDA tensors are met.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infir2.kernels.operand import contiguous_rows


@triton.jit
def _turn(x_ptr, out_ptr, cos, sin, HEADS: tl.constexpr, HALF: tl.constexpr, head_stride, LANES: tl.constexpr):
    """All heads of one token."""
    head, d = tl.arange(0, LANES), tl.arange(0, HALF)
    inside = (head < HEADS)[:, None]
    place = x_ptr + head[:, None] * head_stride + d[None, :]
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
    out = out_ptr + head[:, None] * (2 * HALF) + d[None, :]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(out + HALF, (second * cos + first * sin).to(dtype), mask=inside)


@triton.jit
def _rotate_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, q_stride, k_stride, q_head_stride, k_head_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr,
    LANES: tl.constexpr, KV_LANES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, HALF)
    cos = tl.load(cos_ptr + token * HALF + d)[None, :]
    sin = tl.load(sin_ptr + token * HALF + d)[None, :]
    q_out, k_out = q_out_ptr + token * (HEADS * 2 * HALF), k_out_ptr + token * (KV_HEADS * 2 * HALF)
    _turn(q_ptr + token * q_stride, q_out, cos, sin, HEADS, HALF, q_head_stride, LANES)
    _turn(k_ptr + token * k_stride, k_out, cos, sin, KV_HEADS, HALF, k_head_stride, KV_LANES)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See ``rotary.rotate``."""
    heads, kv_heads, head_dim = q.shape[-2], k.shape[-2], q.shape[-1]
    flat_q, flat_k = contiguous_rows(q.flatten(0, -3)), contiguous_rows(k.flatten(0, -3))
    out_q, out_k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    _rotate_kernel[(flat_q.shape[0],)](
        flat_q, flat_k, cos.contiguous(), sin.contiguous(), out_q, out_k,
        flat_q.stride(0), flat_k.stride(0), flat_q.stride(1), flat_k.stride(1),
        HEADS=heads, KV_HEADS=kv_heads, HALF=head_dim // 2,
        LANES=triton.next_power_of_2(heads), KV_LANES=triton.next_power_of_2(kv_heads), num_warps=4,
    )  # fmt: skip
    return out_q, out_k
