"""Triton kernels of row codes: quantise alone, after RMSNorm, after SwiGLU and in its backward pass; and the transpose.

Every kernel reads its input once. The twins that define the results are in ``rows``, ``norm``, ``swiglu`` and
``reference``. Imported only where a CUDA tensor is quantised. A scale is a power of two, so dividing by it is done as
multiplying by its exact reciprocal.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infir2.kernels.operand import empty_operand, empty_rows
from infir2.kernels.quantize_triton import _rows_contiguous, _scale_from_bits
from infir2.kernels.reference import BLOCK

ROWS = 64  # rows of a tile: 64 x 128 elements a program


@triton.jit
def _magnitude(value):
    """The bits of |value| as int32: they order like the numbers, with Inf and NaN above every finite one."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _reciprocal(scale, bits):
    """1 / scale, exactly, of scales that are powers of two; 0 for blocks that are not finite."""
    exact = (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    return tl.where(bits < 0x7F800000, exact, 0.0)


@triton.jit
def _encode_rows(value):
    """Codes and scales of a [rows, 128] float32 tile, one scale a row."""
    bits = tl.max(_magnitude(value), axis=1)
    scale = _scale_from_bits(bits, True)
    scaled = tl.where((bits < 0x7F800000)[:, None], value * _reciprocal(scale, bits)[:, None], 0.0)
    return scaled.to(tl.float8e4nv), scale


@triton.jit
def _store_rows(
    value, codes_ptr, scale_ptr, amax_ptr, row_block, col_block, rows, cols, AMAX: tl.constexpr, ROWS: tl.constexpr
):
    """Quantise one tile by rows and write its codes, scales (stored column by column) and its columns' maxima."""
    r = row_block * ROWS + tl.arange(0, ROWS)
    c = col_block * 128 + tl.arange(0, 128)
    codes, scale = _encode_rows(value)
    inside = (r < rows)[:, None] & (c < cols)[None, :]
    tl.store(codes_ptr + r.to(tl.int64)[:, None] * cols + c[None, :], codes, mask=inside)
    tl.store(scale_ptr + col_block.to(tl.int64) * rows + r, scale, mask=r < rows)
    if AMAX:
        bits = tl.max(_magnitude(codes.to(tl.float32) * scale[:, None]), axis=0)
        tl.atomic_max(amax_ptr + c, bits, mask=c < cols, sem="relaxed")


@triton.jit
def _load_tile(ptr, row_block, col_block, rows, cols, stride, ROWS: tl.constexpr):
    r = row_block * ROWS + tl.arange(0, ROWS)
    c = col_block * 128 + tl.arange(0, 128)
    inside = (r < rows)[:, None] & (c < cols)[None, :]
    return tl.load(ptr + r.to(tl.int64)[:, None] * stride + c[None, :], mask=inside, other=0.0)


@triton.jit
def _load_half(ptr, scale_ptr, row_block, col_block, rows, cols, CODES: tl.constexpr, ROWS: tl.constexpr):
    """A tile of gate or up as float32, from values or from row codes."""
    value = _load_tile(ptr, row_block, col_block, rows, cols, cols, ROWS).to(tl.float32)
    if CODES:
        r = row_block * ROWS + tl.arange(0, ROWS)
        scale = tl.load(scale_ptr + col_block.to(tl.int64) * rows + r, mask=r < rows, other=1.0)
        value = value * scale[:, None]
    return value


@triton.jit
def _rows_kernel(
    x_ptr, codes_ptr, scale_ptr, amax_ptr, rows, cols, stride, AMAX: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    row_block, col_block = tl.program_id(0), tl.program_id(1)
    value = _load_tile(x_ptr, row_block, col_block, rows, cols, stride, ROWS).to(tl.float32)
    _store_rows(value, codes_ptr, scale_ptr, amax_ptr, row_block, col_block, rows, cols, AMAX, ROWS)


@triton.jit
def _norm_kernel(
    x_ptr, weight_ptr, codes_ptr, scale_ptr, amax_ptr, rstd_ptr, rows, cols, stride, eps,
    AMAX: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """ROWS rows one after another, each as [TILES, 128]; the columns' maxima are kept in registers meanwhile."""
    tile = tl.arange(0, TILES)
    c = tile[:, None] * 128 + tl.arange(0, 128)[None, :]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + c, mask=c < cols, other=0.0).to(dtype).to(tl.float32)
    largest = tl.zeros([TILES, 128], dtype=tl.int32)
    for step in range(ROWS):
        r = (tl.program_id(0) * ROWS + step).to(tl.int64)
        inside = (c < cols) & (r < rows)
        x = tl.load(x_ptr + r * stride + c, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(tl.sum(x * x, axis=1), axis=0) / cols
        rstd = 1.0 / tl.sqrt_rn(mean + eps)
        value = (weight * (x * rstd).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        codes, scale = _encode_rows(value)
        tl.store(codes_ptr + r * cols + c, codes, mask=inside)
        tl.store(scale_ptr + tile.to(tl.int64) * rows + r, scale, mask=(tile * 128 < cols) & (r < rows))
        tl.store(rstd_ptr + r, rstd, mask=r < rows)
        if AMAX:
            largest = tl.maximum(largest, _magnitude(codes.to(tl.float32) * scale[:, None]))
    if AMAX:
        tl.atomic_max(amax_ptr + c, largest, mask=c < cols, sem="relaxed")


@triton.jit
def _swiglu_kernel(
    gate_up_ptr, codes_ptr, scale_ptr, kept_ptr, kept_scale_ptr, rows, inner,
    KEEP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row_block, col_block = tl.program_id(0), tl.program_id(1)
    up_block = col_block + inner // 128
    dtype: tl.constexpr = gate_up_ptr.dtype.element_ty
    gate = _load_half(gate_up_ptr, gate_up_ptr, row_block, col_block, rows, 2 * inner, False, ROWS)
    up = _load_half(gate_up_ptr, gate_up_ptr, row_block, up_block, rows, 2 * inner, False, ROWS)
    value = (gate * tl.sigmoid(gate) * up).to(dtype).to(tl.float32)
    _store_rows(value, codes_ptr, scale_ptr, scale_ptr, row_block, col_block, rows, inner, False, ROWS)
    if KEEP:
        _store_rows(gate, kept_ptr, kept_scale_ptr, scale_ptr, row_block, col_block, rows, 2 * inner, False, ROWS)
        _store_rows(up, kept_ptr, kept_scale_ptr, scale_ptr, row_block, up_block, rows, 2 * inner, False, ROWS)


@triton.jit
def _swiglu_backward_kernel(
    grad_ptr, gate_up_ptr, kept_scale_ptr,
    grad_codes_ptr, grad_scale_ptr, grad_amax_ptr, codes_ptr, scale_ptr, amax_ptr, rows, inner,
    CODES: tl.constexpr, AMAX: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row_block, col_block = tl.program_id(0), tl.program_id(1)
    up_block = col_block + inner // 128
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    grad = _load_tile(grad_ptr, row_block, col_block, rows, inner, inner, ROWS).to(tl.float32)
    gate = _load_half(gate_up_ptr, kept_scale_ptr, row_block, col_block, rows, 2 * inner, CODES, ROWS)
    up = _load_half(gate_up_ptr, kept_scale_ptr, row_block, up_block, rows, 2 * inner, CODES, ROWS)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    value = (silu * up).to(dtype).to(tl.float32)
    _store_rows(value, codes_ptr, scale_ptr, amax_ptr, row_block, col_block, rows, inner, AMAX, ROWS)
    grad_gate = (grad * up * sigmoid * (1 + gate * (1 - sigmoid))).to(dtype).to(tl.float32)
    _store_rows(
        grad_gate, grad_codes_ptr, grad_scale_ptr, grad_amax_ptr, row_block, col_block, rows, 2 * inner, AMAX, ROWS
    )
    grad_up = (grad * silu).to(dtype).to(tl.float32)
    _store_rows(
        grad_up, grad_codes_ptr, grad_scale_ptr, grad_amax_ptr, row_block, up_block, rows, 2 * inner, AMAX, ROWS
    )


@triton.jit
def _transpose_kernel(codes_ptr, scale_ptr, amax_ptr, codes_t_ptr, scale_t_ptr, rows, cols, CHANNEL: tl.constexpr):
    """A 128 x 128 tile of codes, moved to its new scales: exact but for what becomes subnormal there."""
    row_block, col_block = tl.program_id(0), tl.program_id(1)
    r = row_block * 128 + tl.arange(0, 128)
    c = col_block * 128 + tl.arange(0, 128)
    scale = tl.load(scale_ptr + col_block.to(tl.int64) * rows + r, mask=r < rows, other=1.0)
    codes = _load_tile(codes_ptr, row_block, col_block, rows, cols, cols, 128)
    value = codes.to(tl.float32) * scale[:, None]
    if CHANNEL:
        bits = _magnitude(tl.load(amax_ptr + c, mask=c < cols, other=0.0))
    else:
        bits = tl.max(_magnitude(value), axis=0)
    scale_t = _scale_from_bits(bits, True)
    moved = tl.where((bits < 0x7F800000)[None, :], value * _reciprocal(scale_t, bits)[None, :], 0.0)
    inside_t = (c < cols)[:, None] & (r < rows)[None, :]
    out = codes_t_ptr + c.to(tl.int64)[:, None] * rows + r[None, :]
    tl.store(out, tl.trans(moved.to(tl.float8e4nv)), mask=inside_t)
    if CHANNEL:
        tl.store(scale_t_ptr + c, scale_t, mask=(c < cols) & (row_block == 0))
    else:
        tl.store(scale_t_ptr + row_block.to(tl.int64) * cols + c, scale_t, mask=c < cols)


@triton.jit
def _transpose_bytes_kernel(in_ptr, out_ptr, rows, cols):
    r = tl.program_id(0) * 128 + tl.arange(0, 128)
    c = tl.program_id(1) * 128 + tl.arange(0, 128)
    tile = _load_tile(in_ptr, tl.program_id(0), tl.program_id(1), rows, cols, cols, 128)
    inside_t = (c < cols)[:, None] & (r < rows)[None, :]
    tl.store(out_ptr + c.to(tl.int64)[:, None] * rows + r[None, :], tl.trans(tile), mask=inside_t)


def quantize_rows(x: Tensor, amax: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See ``rows.quantize_rows``."""
    x = _rows_contiguous(x)
    rows, cols = x.shape
    codes, scale, largest = _zeroed_rows(rows, cols, amax, x.device)
    _rows_kernel[_grid(rows, cols, ROWS)](
        x, codes, scale, _bits(largest), rows, cols, x.stride(0), AMAX=amax, ROWS=ROWS, num_warps=4
    )
    return codes, scale, largest


def norm_quantize(x: Tensor, weight: Tensor, eps: float, amax: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``norm.norm_quantize``."""
    x = _rows_contiguous(x)
    rows, cols = x.shape
    codes, scale, largest = _zeroed_rows(rows, cols, amax, x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    tiles = triton.next_power_of_2(triton.cdiv(cols, BLOCK))
    rows_a_program = 16 if amax else 4
    _norm_kernel[(triton.cdiv(rows, rows_a_program),)](
        x, weight, codes, scale, _bits(largest), rstd, rows, cols, x.stride(0), eps,
        AMAX=amax, ROWS=rows_a_program, TILES=tiles, num_warps=4,
    )  # fmt: skip
    return codes, scale, largest, rstd


def swiglu_quantize(gate_up: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``swiglu.swiglu_quantize``."""
    rows, inner = gate_up.shape[0], _whole_tiles(gate_up.shape[1] // 2)
    codes, scale, _ = empty_rows(rows, inner, False, gate_up.device)
    kept, kept_scale, _ = empty_rows(rows if keep else 0, 2 * inner, False, gate_up.device)
    _swiglu_kernel[_grid(rows, inner, ROWS)](
        gate_up.contiguous(), codes, scale, kept, kept_scale, rows, inner, KEEP=keep, ROWS=ROWS, num_warps=4
    )
    return codes, scale, kept, kept_scale


def swiglu_backward_quantize(
    grad: Tensor, gate_up: Tensor, kept_scale: Tensor, amax: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``swiglu.swiglu_backward_quantize``."""
    rows, inner = grad.shape[0], _whole_tiles(grad.shape[1])
    grad_codes, grad_scale, grad_amax = _zeroed_rows(rows, 2 * inner, amax, grad.device)
    codes, scale, largest = _zeroed_rows(rows, inner, amax, grad.device)
    _swiglu_backward_kernel[_grid(rows, inner, ROWS)](
        grad.contiguous(), gate_up.contiguous(), kept_scale,
        grad_codes, grad_scale, _bits(grad_amax), codes, scale, _bits(largest), rows, inner,
        CODES=gate_up.dtype == torch.float8_e4m3fn, AMAX=amax, ROWS=ROWS, num_warps=4,
    )  # fmt: skip
    return grad_codes, grad_scale, grad_amax, codes, scale, largest


def transpose_rows(codes: Tensor, scale: Tensor, amax: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    """See ``rows.transpose_rows``."""
    rows, cols = codes.shape
    codes_t, scale_t = empty_operand(cols, rows, granularity, codes.device)
    _transpose_kernel[_grid(rows, cols, BLOCK)](
        codes, scale, amax, codes_t, scale_t, rows, cols, CHANNEL=granularity == "channel", num_warps=8
    )
    return codes_t, scale_t


def transpose_codes(codes: Tensor) -> Tensor:
    """codes.T, contiguous, of a contiguous matrix of one-byte elements."""
    rows, cols = codes.shape
    out = torch.empty(cols, rows, dtype=torch.uint8, device=codes.device)
    _transpose_bytes_kernel[_grid(rows, cols, BLOCK)](codes.view(torch.uint8), out, rows, cols, num_warps=8)
    return out.view(codes.dtype)


def _grid(rows: int, cols: int, height: int) -> tuple[int, int]:
    return triton.cdiv(rows, height), triton.cdiv(cols, BLOCK)


def _zeroed_rows(rows: int, cols: int, amax: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale, largest = empty_rows(rows, cols, amax, device)
    return codes, scale, largest.zero_()


def _bits(largest: Tensor) -> Tensor:
    """Maxima are taken on bits: an integer maximum also finds Inf and NaN, and needs no order."""
    return largest.view(torch.int32)


def _whole_tiles(inner: int) -> int:
    if inner % BLOCK:
        raise ValueError(f"the fused SwiGLU needs an inner size that is a multiple of {BLOCK}, got {inner}")
    return inner
