"""Triton kernels of SwiGLU: to row codes, forward and backward, and plain where no gradient is wanted.

``swiglu`` holds their twins. Imported only where CUDA tensors are met.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infir2.kernels.codes_triton import raise_maxima, store_maxima, store_tiles, strip_grid, to_float32
from infir2.kernels.operand import contiguous_rows, empty_rows, zeroed_rows
from infir2.kernels.reference import BLOCK


@triton.jit
def _sigmoid(x):
    """1 / (1 + 2^(-x log2 e)) by the hardware's approximations: a few units in the twin's last place, more where |x| is
    large, so that few codes are a neighbour of the twin's."""
    return tl.inline_asm_elementwise(
        """{ .reg .f32 t;
        mul.f32 t, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 t, t;
        add.f32 t, t, 0f3F800000;
        rcp.approx.ftz.f32 $0, t; }""",
        "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _load(ptr, scale_ptr, r, c, inside, rows, stride, CODES: tl.constexpr):
    """A tile of values, or of row codes, as float32."""
    value = to_float32(tl.load(ptr + (r[:, None] * stride + c[None, :]), mask=inside, other=0.0))
    if CODES:
        value = value * tl.load(scale_ptr + r, mask=r < rows, other=1.0)[:, None]
    return value


@triton.jit
def _swiglu_kernel(
    gate_up_ptr, codes_ptr, scale_ptr, kept_ptr, kept_scale_ptr, rows, inner,
    KEEP: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first, col_block = tl.program_id(0) * (STEPS * ROWS), tl.program_id(1)
    left = rows - first
    c = tl.arange(0, 128)
    start = first.to(tl.int64) * inner + col_block * 128
    gate_start = start + first.to(tl.int64) * inner  # in a matrix of both halves
    up_start = gate_start + inner
    scales = col_block.to(tl.int64) * rows + first
    up_scales = (col_block + inner // 128).to(tl.int64) * rows + first
    for step in tl.range(STEPS, num_stages=STAGES):
        r = step * ROWS + tl.arange(0, ROWS)
        inside = (r < left)[:, None]
        gate = _load(gate_up_ptr + gate_start, kept_scale_ptr, r, c, inside, left, 2 * inner, False)
        up = _load(gate_up_ptr + up_start, kept_scale_ptr, r, c, inside, left, 2 * inner, False)
        store_tiles(gate * _sigmoid(gate) * up, codes_ptr + start, scale_ptr + scales, r, c, inside, left, inner)
        if KEEP:
            store_tiles(gate, kept_ptr + gate_start, kept_scale_ptr + scales, r, c, inside, left, 2 * inner)
            store_tiles(up, kept_ptr + up_start, kept_scale_ptr + up_scales, r, c, inside, left, 2 * inner)


@triton.jit
def _swiglu_backward_kernel(
    grad_ptr, gate_up_ptr, kept_scale_ptr,
    grad_codes_ptr, grad_scale_ptr, grad_amax_ptr, codes_ptr, scale_ptr, amax_ptr, rows, inner,
    CODES: tl.constexpr, AMAX: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first, col_block = tl.program_id(0) * (STEPS * ROWS), tl.program_id(1)
    left = rows - first
    c = tl.arange(0, 128)
    start = first.to(tl.int64) * inner + col_block * 128
    gate_start = start + first.to(tl.int64) * inner  # in a matrix of both halves
    up_start = gate_start + inner
    scales = col_block.to(tl.int64) * rows + first
    up_scales = (col_block + inner // 128).to(tl.int64) * rows + first
    columns = tl.zeros([ROWS, 128], tl.float32)
    gate_columns = tl.zeros([ROWS, 128], tl.float32)
    up_columns = tl.zeros([ROWS, 128], tl.float32)
    highest = tl.zeros([ROWS], tl.float32)
    gate_highest = tl.zeros([ROWS], tl.float32)
    up_highest = tl.zeros([ROWS], tl.float32)
    for step in tl.range(STEPS, num_stages=STAGES):  # the next tiles are fetched while one is worked on
        r = step * ROWS + tl.arange(0, ROWS)
        inside = (r < left)[:, None]
        grad = _load(grad_ptr + start, grad_ptr, r, c, inside, left, inner, False)
        gate = _load(gate_up_ptr + gate_start, kept_scale_ptr + scales, r, c, inside, left, 2 * inner, CODES)
        up = _load(gate_up_ptr + up_start, kept_scale_ptr + up_scales, r, c, inside, left, 2 * inner, CODES)
        sigmoid = _sigmoid(gate)
        silu = gate * sigmoid
        value, grad_up = silu * up, grad * silu
        grad_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
        largest = store_tiles(value, codes_ptr + start, scale_ptr + scales, r, c, inside, left, inner)
        gate_largest = store_tiles(
            grad_gate, grad_codes_ptr + gate_start, grad_scale_ptr + scales, r, c, inside, left, 2 * inner
        )
        up_largest = store_tiles(
            grad_up, grad_codes_ptr + up_start, grad_scale_ptr + up_scales, r, c, inside, left, 2 * inner
        )
        if AMAX:
            columns, highest = raise_maxima(columns, highest, value, largest)
            gate_columns, gate_highest = raise_maxima(gate_columns, gate_highest, grad_gate, gate_largest)
            up_columns, up_highest = raise_maxima(up_columns, up_highest, grad_up, up_largest)
    if AMAX:
        c += col_block * 128
        store_maxima(amax_ptr, columns, highest, c, c < inner, inner)
        store_maxima(grad_amax_ptr, gate_columns, gate_highest, c, c < inner, 2 * inner)
        store_maxima(grad_amax_ptr + inner, up_columns, up_highest, c, c < inner, 2 * inner)


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


# Shapes of the launches: rows of a tile of 128 columns, tiles of a strip, tiles in flight, warps. Where column maxima
# are taken strips are long and tiles small: in one warp no reduction waits for another.
_FORWARD = {"ROWS": 16, "STEPS": 1, "STAGES": 1, "num_warps": 4}
_BACKWARD = {"ROWS": 16, "STEPS": 8, "STAGES": 3, "num_warps": 4}
_BACKWARD_AMAX = {"ROWS": 4, "STEPS": 64, "STAGES": 3, "num_warps": 1}


def swiglu_quantize(gate_up: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``swiglu.swiglu_quantize``."""
    rows, inner = gate_up.shape[0], _whole_tiles(gate_up.shape[1] // 2)
    codes, scale, _ = empty_rows(rows, inner, False, gate_up.device)
    kept, kept_scale, _ = empty_rows(rows if keep else 0, 2 * inner, False, gate_up.device)
    _swiglu_kernel[strip_grid(rows, inner, _FORWARD)](
        gate_up.contiguous(), codes, scale, kept, kept_scale, rows, inner, KEEP=keep, **_FORWARD
    )
    return codes, scale, kept, kept_scale


def swiglu_backward_quantize(
    grad: Tensor, gate_up: Tensor, kept_scale: Tensor, amax: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``swiglu.swiglu_backward_quantize``."""
    rows, inner = grad.shape[0], _whole_tiles(grad.shape[1])
    grad_codes, grad_scale, grad_amax = zeroed_rows(rows, 2 * inner, amax, grad.device)
    codes, scale, largest = zeroed_rows(rows, inner, amax, grad.device)
    shape = _BACKWARD_AMAX if amax else _BACKWARD
    _swiglu_backward_kernel[strip_grid(rows, inner, shape)](
        grad.contiguous(), gate_up.contiguous(), kept_scale, grad_codes, grad_scale, grad_amax.view(torch.int32),
        codes, scale, largest.view(torch.int32), rows, inner,
        CODES=gate_up.dtype == torch.float8_e4m3fn, AMAX=amax, **shape,
    )  # fmt: skip
    return grad_codes, grad_scale, grad_amax, codes, scale, largest


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """See ``swiglu.silu_mul``."""
    cols = gate.shape[-1]
    flat_gate, flat_up = contiguous_rows(gate.flatten(0, -2)), contiguous_rows(up.flatten(0, -2))
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    size = 1024
    _silu_mul_kernel[(flat_gate.shape[0], triton.cdiv(cols, size))](
        flat_gate, flat_up, out, cols, flat_gate.stride(0), flat_up.stride(0), SIZE=size, num_warps=4
    )
    return out


def _whole_tiles(inner: int) -> int:
    if inner % BLOCK:
        raise ValueError(f"the fused SwiGLU needs an inner size that is a multiple of {BLOCK}, got {inner}")
    return inner
