"""Triton kernels of the quantiser, bit-identical to ``reference``. Imported only where a CUDA tensor is quantised.

``_tile_kernel`` reads a 128 x 128 tile once and writes, as asked, its 1x128 codes, the 1x128 codes of its transpose
and its 128x128 codes. Channel and tensor granularity take two passes: ``_amax_kernel``, then ``_cast_kernel`` with the
scales. All scale arithmetic is on the bits of |x|: as integers, Inf and NaN compare above every finite value, so one
maximum both finds the amax and detects them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infir2.kernels.codes_triton import scale_from_bits
from infir2.kernels.operand import contiguous_rows, empty_operand
from infir2.kernels.reference import BLOCK, scale_from_amax


@triton.jit
def _encode(x, scale, finite):
    """e4m3 codes of x / scale; zero where the block is not finite. Shapes already broadcast."""
    value = tl.div_rn(x, scale)
    value = tl.where(finite, value, 0.0)
    value = tl.minimum(tl.maximum(value, -448.0), 448.0)
    return value.to(tl.float8e4nv)


@triton.jit
def _tile_kernel(
    x_ptr, codes_ptr, scale_ptr, codes_t_ptr, scale_t_ptr, rows, cols, x_stride, block_scale_stride,
    ROW: tl.constexpr, COL: tl.constexpr, SQUARE: tl.constexpr, UE8M0: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row_block = tl.program_id(0)
    col_block = tl.program_id(1)
    r = row_block * SIZE + tl.arange(0, SIZE)
    c = col_block * SIZE + tl.arange(0, SIZE)
    r_wide = r.to(tl.int64)
    c_wide = c.to(tl.int64)
    inside = (r < rows)[:, None] & (c < cols)[None, :]
    x = tl.load(x_ptr + r_wide[:, None] * x_stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if ROW:
        row_bits = tl.max(bits, axis=1)
        scale = scale_from_bits(row_bits, UE8M0)
        codes = _encode(x, tl.broadcast_to(scale[:, None], x.shape), (row_bits < 0x7F800000)[:, None])
        tl.store(codes_ptr + r_wide[:, None] * cols + c[None, :], codes, mask=inside)
        tl.store(scale_ptr + col_block.to(tl.int64) * rows + r, scale, mask=r < rows)
    if COL:
        col_bits = tl.max(bits, axis=0)
        scale_t = scale_from_bits(col_bits, UE8M0)
        codes_t = _encode(x, tl.broadcast_to(scale_t[None, :], x.shape), (col_bits < 0x7F800000)[None, :])
        inside_t = (c < cols)[:, None] & (r < rows)[None, :]
        tl.store(codes_t_ptr + c_wide[:, None] * rows + r[None, :], tl.trans(codes_t), mask=inside_t)
        tl.store(scale_t_ptr + row_block.to(tl.int64) * cols + c, scale_t, mask=c < cols)
    if SQUARE:
        block_bits = tl.max(tl.max(bits, axis=1), axis=0)
        block_scale = scale_from_bits(block_bits, UE8M0)
        codes = _encode(x, tl.broadcast_to(block_scale, x.shape), block_bits < 0x7F800000)
        tl.store(codes_ptr + r_wide[:, None] * cols + c[None, :], codes, mask=inside)
        tl.store(scale_ptr + row_block * block_scale_stride + col_block, block_scale)


@triton.jit
def _amax_kernel(
    x_ptr, bits_ptr, rows, cols, x_stride, PER_ROW: tl.constexpr, PER_COL: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """Maximum of the bits of |x| by row, by column or over all, into int32 zeros. Maxima do not depend on order."""
    r = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    c = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = (r < rows)[:, None] & (c < cols)[None, :]
    x = tl.load(x_ptr + r.to(tl.int64)[:, None] * x_stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if PER_ROW:
        tl.atomic_max(bits_ptr + r, tl.max(bits, axis=1), mask=r < rows, sem="relaxed")
    elif PER_COL:
        tl.atomic_max(bits_ptr + c, tl.max(bits, axis=0), mask=c < cols, sem="relaxed")
    else:
        tl.atomic_max(bits_ptr, tl.max(tl.max(bits, axis=1), axis=0), sem="relaxed")


@triton.jit
def _cast_kernel(
    x_ptr, scale_ptr, codes_ptr, rows, cols, x_stride,
    PER_ROW: tl.constexpr, PER_COL: tl.constexpr, TRANSPOSE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    c = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    r_wide = r.to(tl.int64)
    c_wide = c.to(tl.int64)
    inside = (r < rows)[:, None] & (c < cols)[None, :]
    x = tl.load(x_ptr + r_wide[:, None] * x_stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
    if PER_ROW:
        scale = tl.load(scale_ptr + r, mask=r < rows, other=1.0)[:, None]
    elif PER_COL:
        scale = tl.load(scale_ptr + c, mask=c < cols, other=1.0)[None, :]
    else:
        scale = tl.load(scale_ptr)
    scale = tl.broadcast_to(scale, x.shape)
    codes = _encode(x, scale, scale == scale)
    if TRANSPOSE:
        inside_t = (c < cols)[:, None] & (r < rows)[None, :]
        tl.store(codes_ptr + c_wide[:, None] * rows + r[None, :], tl.trans(codes), mask=inside_t)
    else:
        tl.store(codes_ptr + r_wide[:, None] * cols + c[None, :], codes, mask=inside)


def quantize(x: Tensor, granularity: str, scale_format: str, transpose: bool) -> tuple[Tensor, Tensor]:
    """See ``infir2.kernels.quantize.quantize``; ``x`` is a CUDA matrix. Transposed 128x128 blocks are left to it."""
    if granularity in ("tile", "block"):
        return _quantize_blocks(x, granularity, scale_format, transpose)
    return _quantize_known(x, granularity, scale_format, transpose)


def quantize_tiles_both(x: Tensor, scale_format: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1x128 operands of ``x`` and of x.T in one pass."""
    x = contiguous_rows(x)
    rows, cols = x.shape
    codes, scale = empty_operand(rows, cols, "tile", x.device)
    codes_t, scale_t = empty_operand(cols, rows, "tile", x.device)
    _launch_tiles(x, codes, scale, codes_t, scale_t, scale_format, row=True, col=True, square=False)
    return codes, scale, codes_t, scale_t


def _quantize_blocks(x: Tensor, granularity: str, scale_format: str, transpose: bool) -> tuple[Tensor, Tensor]:
    x = contiguous_rows(x)
    rows, cols = x.shape
    if granularity == "tile" and transpose:
        codes, scale = empty_operand(cols, rows, "tile", x.device)
        _launch_tiles(x, codes, scale, codes, scale, scale_format, row=False, col=True, square=False)
        return codes, scale
    codes, scale = empty_operand(rows, cols, granularity, x.device)
    square = granularity == "block"
    _launch_tiles(x, codes, scale, codes, scale, scale_format, row=not square, col=False, square=square)
    return codes, scale


def _launch_tiles(
    x: Tensor, codes: Tensor, scale: Tensor, codes_t: Tensor, scale_t: Tensor, scale_format: str,
    row: bool, col: bool, square: bool,
) -> None:  # fmt: skip
    rows, cols = x.shape
    grid = (triton.cdiv(rows, BLOCK), triton.cdiv(cols, BLOCK))
    _tile_kernel[grid](
        x, codes, scale, codes_t, scale_t, rows, cols, x.stride(0), scale.stride(0),
        ROW=row, COL=col, SQUARE=square, UE8M0=scale_format == "ue8m0", SIZE=BLOCK, num_warps=8,
    )  # fmt: skip


def _quantize_known(x: Tensor, granularity: str, scale_format: str, transpose: bool) -> tuple[Tensor, Tensor]:
    """Channel and tensor granularity: one pass for the amax, one for the cast."""
    x = contiguous_rows(x)
    rows, cols = x.shape
    codes, scale = empty_operand(cols if transpose else rows, rows if transpose else cols, granularity, x.device)
    channel = granularity == "channel"
    per_row, per_col = channel and not transpose, channel and transpose
    grid = (triton.cdiv(rows, BLOCK), triton.cdiv(cols, BLOCK))
    bits = torch.zeros(scale.shape, dtype=torch.int32, device=x.device)
    _amax_kernel[grid](
        x, bits, rows, cols, x.stride(0), PER_ROW=per_row, PER_COL=per_col, SIZE=BLOCK, num_warps=8
    )  # fmt: skip
    scale.copy_(scale_from_amax(bits.view(torch.float32), scale_format))
    _cast_kernel[grid](
        x, scale, codes, rows, cols, x.stride(0),
        PER_ROW=per_row, PER_COL=per_col, TRANSPOSE=transpose, SIZE=BLOCK, num_warps=8,
    )  # fmt: skip
    return codes, scale
