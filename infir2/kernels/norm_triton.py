"""Triton kernels of RMSNorm: plain where no gradient is wanted, with its output as row codes, and its backward pass.

``norm`` holds their twins. A program has whole rows in its registers, so each tensor is read once. Imported only where
CUDA tensors are met.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infir2.kernels.codes_triton import AMAX_PARTS, encode_tiles, raise_maxima, to_float32
from infir2.kernels.operand import contiguous_rows, zeroed_rows
from infir2.kernels.reference import BLOCK


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
def _scaled(x, rstd, weight):
    """weight * (x * rstd), rounded after each product to the dtype of the weight: two at a time in bfloat16."""
    if weight.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            """{ .reg .f32 a, b; .reg .b32 word;
            mul.f32 a, $1, $3;
            mul.f32 b, $2, $4;
            cvt.rn.bf16x2.f32 word, b, a;
            mul.rn.bf16x2 $0, word, $5; }""",
            "=r,f,f,f,f,r", [x, rstd, weight], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return weight * (x * rstd)


@triton.jit
def _norm_quantize_kernel(
    x_ptr, update_ptr, weight_ptr, sum_ptr, codes_ptr, scale_ptr, amax_ptr, rows, cols, stride, update_stride, eps,
    UPDATE: tl.constexpr, AMAX: tl.constexpr, STEPS: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """STEPS rows one after another, each as [TILES, 128]; with UPDATE of x + update, which is written as well."""
    first = tl.program_id(0) * STEPS
    tile = tl.arange(0, TILES)
    c = tile[:, None] * 128 + tl.arange(0, 128)[None, :]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + c, mask=c < cols, other=0.0).to(dtype)
    x_ptr += first.to(tl.int64) * stride
    update_ptr += first.to(tl.int64) * update_stride
    sum_ptr += first.to(tl.int64) * cols
    codes_ptr += first.to(tl.int64) * cols
    scale_ptr += tile.to(tl.int64) * rows + first
    columns = tl.zeros([TILES, 128], tl.float32)
    highest = tl.zeros([TILES], tl.float32)
    for step in tl.range(STEPS, num_stages=STAGES):
        there = step < rows - first
        inside = (c < cols) & there
        x = to_float32(tl.load(x_ptr + (step * stride + c), mask=inside, other=0.0))
        if UPDATE:
            x += to_float32(tl.load(update_ptr + (step * update_stride + c), mask=inside, other=0.0))
            rounded = x.to(dtype)
            tl.store(sum_ptr + (step * cols + c), rounded, mask=inside)
            x = to_float32(rounded)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(tl.sum(x * x, axis=1), axis=0) / cols + eps)
        value = to_float32(_scaled(x, tl.broadcast_to(rstd, x.shape), weight))
        codes, scale, largest = encode_tiles(value)
        tl.store(codes_ptr + (step * cols + c), codes, mask=inside)
        tl.store(scale_ptr + step, scale, mask=(tile * 128 < cols) & there)
        if AMAX:
            columns, highest = raise_maxima(columns, highest, value, largest)
    if AMAX:
        finite = (highest.to(tl.int32, bitcast=True) < 0x7F800000)[:, None]
        bits = tl.where(finite, columns.to(tl.int32, bitcast=True), 0x7FC00000)
        part = tl.program_id(0) % AMAX_PARTS
        tl.atomic_max(amax_ptr + part * cols + c, bits, mask=c < cols, sem="relaxed")


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def _norm_backward_kernel(
    grad_ptr, x_ptr, residual_ptr, weight_ptr, dx_ptr, parts_ptr,
    rows, cols, grad_stride, x_stride, residual_stride, eps,
    COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program i of n takes the rows i, i + n, i + 2 n ... and adds up their part of the weight's gradient."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    c = tl.arange(0, COLS)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    weight = to_float32(tl.load(weight_ptr + c, mask=c < cols, other=0.0).to(dtype))
    total = tl.zeros([COLS], tl.float32)
    share = 1.0 / cols
    for step in tl.range(tl.cdiv(rows - part, parts), num_stages=STAGES):  # the next row is fetched meanwhile
        r = (part + step * parts).to(tl.int64)
        x = to_float32(tl.load(x_ptr + r * x_stride + c, mask=c < cols, other=0.0))
        grad = to_float32(tl.load(grad_ptr + r * grad_stride + c, mask=c < cols, other=0.0))
        product = grad * x
        squares, along = tl.reduce((x * x, product * weight), 0, _add_both)
        rstd = tl.rsqrt(squares * share + eps)
        residual = to_float32(tl.load(residual_ptr + r * residual_stride + c, mask=c < cols, other=0.0))
        dx = grad * weight * rstd - x * (rstd * rstd * rstd * along * share) + residual
        tl.store(dx_ptr + r * cols + c, dx.to(dtype), mask=c < cols)
        total += product * rstd
    tl.store(parts_ptr + part * cols + c, total, mask=c < cols)


_ELEMENTS = 2048  # that a program of the plain norm handles at least, so that short rows share one
# Of the other two: rows that a program of the forward pass walks down (with column maxima, without, and where there are
# few rows), rows in flight, and elements of a row that one warp takes, forward and backward.
_AMAX_STEPS, _STEPS, _FEW_ROWS = 16, 4, 2048
_STAGES, _WARP = 1, 1024
_BACKWARD_STAGES, _BACKWARD_WARP = 3, 512


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``norm.rms_norm``."""
    cols = x.shape[-1]
    # Two strides are enough for heads that lie in the rows of a wider matrix.
    wide = x.flatten(0, -3) if x.dim() > 2 else x.view(1, -1, cols)
    wide = contiguous_rows(wide)
    outer, inner = wide.shape[0], wide.shape[1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width = triton.next_power_of_2(cols)
    rows_a_program = max(1, _ELEMENTS // width)
    _norm_kernel[(triton.cdiv(outer * inner, rows_a_program),)](
        wide, weight, out, outer * inner, cols, inner, wide.stride(0), wide.stride(1), eps,
        ROWS=rows_a_program, COLS=width, num_warps=4 if width <= 4096 else 8,
    )  # fmt: skip
    return out


def norm_quantize(
    x: Tensor, weight: Tensor, eps: float, amax: bool, update: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``norm.norm_quantize``."""
    x = contiguous_rows(x)
    added = x if update is None else contiguous_rows(update)
    rows, cols = x.shape
    codes, scale, largest = zeroed_rows(rows, cols, amax, x.device)
    total = torch.empty(0 if update is None else rows, cols, dtype=x.dtype, device=x.device)
    width = triton.next_power_of_2(triton.cdiv(cols, BLOCK)) * BLOCK
    steps = _AMAX_STEPS if amax else _STEPS if rows > _FEW_ROWS else 1
    _norm_quantize_kernel[(triton.cdiv(rows, steps),)](
        x, added, weight, total, codes, scale, largest.view(torch.int32), rows, cols, x.stride(0), added.stride(0), eps,
        UPDATE=update is not None, AMAX=amax, STEPS=steps, TILES=width // BLOCK, STAGES=_STAGES,
        num_warps=_warps(width, _WARP),
    )  # fmt: skip
    return codes, scale, largest, total


def norm_gradients(
    grad: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float, parts: int
) -> tuple[Tensor, Tensor]:
    """See ``norm.norm_gradients``."""
    grad, x, residual = (contiguous_rows(tensor) for tensor in (grad, x, residual))
    rows, cols = x.shape
    dx = torch.empty(rows, cols, dtype=x.dtype, device=x.device)
    sums = torch.empty(parts, cols, dtype=torch.float32, device=x.device)
    width = triton.next_power_of_2(cols)
    _norm_backward_kernel[(parts,)](
        grad, x, residual, weight, dx, sums, rows, cols, grad.stride(0), x.stride(0), residual.stride(0), eps,
        COLS=width, STAGES=_BACKWARD_STAGES, num_warps=_warps(width, _BACKWARD_WARP),
    )  # fmt: skip
    return dx, sums


def _warps(width: int, each: int) -> int:
    return min(max(width // each, 1), 16)
