"""Triton kernels of a forward pass that keeps nothing for a backward pass: RMSNorm, rotary positions, SwiGLU.

Each reads its input once and rounds where its twin (``norm``, ``rotary``, ``swiglu``) rounds. Imported only where CUDA
tensors are met.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 2048  # that a program handles at least, so that short rows share one


@triton.jit(do_not_specialize=["rows", "inner"])  # else other numbers of tokens would compile it again
def _norm_kernel(
    x_ptr, weight_ptr, out_ptr, rows, cols, inner, outer_stride, inner_stride, eps,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (c < cols)[None, :]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    start = (row // inner).to(tl.int64) * outer_stride + (row % inner) * inner_stride
    x = tl.load(x_ptr + start[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + c, mask=c < cols, other=0.0).to(dtype).to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / cols + eps)
    out = weight[None, :] * (x * rstd[:, None]).to(dtype).to(tl.float32)
    tl.store(out_ptr + row.to(tl.int64)[:, None] * cols + c[None, :], out.to(dtype), mask=inside)


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


@triton.jit
def _silu_mul_kernel(gate_ptr, up_ptr, out_ptr, cols, gate_stride, up_stride, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = c < cols
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + row * gate_stride + c, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + c, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * cols + c, (silu * up).to(dtype), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``norm.rms_norm``."""
    cols = x.shape[-1]
    # Two strides are enough for heads that lie in the rows of a wider matrix.
    wide = x.flatten(0, -3) if x.dim() > 2 else x.view(1, -1, cols)
    wide = wide if wide.stride(-1) == 1 else wide.contiguous()
    outer, inner = wide.shape[0], wide.shape[1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width = triton.next_power_of_2(cols)
    rows_a_program = max(1, _ELEMENTS // width)
    _norm_kernel[(triton.cdiv(outer * inner, rows_a_program),)](
        wide, weight, out, outer * inner, cols, inner, wide.stride(0), wide.stride(1), eps,
        ROWS=rows_a_program, COLS=width, num_warps=4 if width <= 4096 else 8,
    )  # fmt: skip
    return out


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See ``rotary.rotate``."""
    heads, kv_heads, head_dim = q.shape[-2], k.shape[-2], q.shape[-1]
    flat_q, flat_k = _tokens_of_heads(q), _tokens_of_heads(k)
    out_q, out_k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    _rotate_kernel[(flat_q.shape[0],)](
        flat_q, flat_k, cos.contiguous(), sin.contiguous(), out_q, out_k,
        flat_q.stride(0), flat_k.stride(0), flat_q.stride(1), flat_k.stride(1),
        HEADS=heads, KV_HEADS=kv_heads, HALF=head_dim // 2,
        LANES=triton.next_power_of_2(heads), KV_LANES=triton.next_power_of_2(kv_heads), num_warps=4,
    )  # fmt: skip
    return out_q, out_k


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """See ``swiglu.silu_mul``."""
    cols = gate.shape[-1]
    flat_gate, flat_up = _rows(gate), _rows(up)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    size = 1024
    _silu_mul_kernel[(flat_gate.shape[0], triton.cdiv(cols, size))](
        flat_gate, flat_up, out, cols, flat_gate.stride(0), flat_up.stride(0), SIZE=size, num_warps=4
    )
    return out


def _rows(x: Tensor) -> Tensor:
    """[..., cols] -> [rows, cols] with adjacent elements in a row; no copy of what a split leaves."""
    x = x.flatten(0, -2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _tokens_of_heads(x: Tensor) -> Tensor:
    """[batch, length, heads, head_dim] -> [tokens, heads, head_dim] with adjacent elements in a head."""
    x = x.flatten(0, -3)
    return x if x.stride(-1) == 1 else x.contiguous()
