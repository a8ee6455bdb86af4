"""Triton kernels of row codes: quantise alone, after RMSNorm, after SwiGLU and in its backward pass.

Every kernel reads its input once. The twins that define the results are in ``rows``, ``norm`` and ``swiglu``. Imported
only where a CUDA tensor is quantised. A scale is a power of two, so dividing by it is done as multiplying by its exact
reciprocal. These kernels are bound by instructions as much as by memory: tiles are small, so that many programs share a
multiprocessor, and each program walks down a strip of rows, so that column maxima stay in registers until its end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infir2.kernels.operand import AMAX_PARTS, empty_rows
from infir2.kernels.quantize_triton import _rows_contiguous, _scale_from_bits
from infir2.kernels.reference import BLOCK

PARTS = tl.constexpr(AMAX_PARTS)


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
def _encode_rows(value):
    """Of a [rows, 128] float32 tile: codes, one scale a row, and the magnitudes, NaN in rows that are not finite."""
    magnitude = _magnitude(value)
    bits = tl.max(magnitude, axis=1)
    scale = _scale_from_bits(bits, True)
    finite = bits < 0x7F800000
    scaled = tl.where(finite[:, None], value * _reciprocal(scale, bits)[:, None], 0.0)
    return scaled.to(tl.float8e4nv), scale, tl.maximum(magnitude, tl.where(finite, 0, 0x7FC00000)[:, None])


@triton.jit
def _store_rows(value, codes_ptr, scale_ptr, r, c, col_block, rows, cols):
    """Quantise one tile by rows and write its codes and its scales (stored column by column); its magnitudes."""
    codes, scale, magnitude = _encode_rows(value)
    inside = (r < rows)[:, None] & (c < cols)[None, :]
    tl.store(codes_ptr + r.to(tl.int64)[:, None] * cols + c[None, :], codes, mask=inside)
    tl.store(scale_ptr + col_block.to(tl.int64) * rows + r, scale, mask=r < rows)
    return magnitude


@triton.jit
def _load_tile(ptr, r, c, rows, cols, stride):
    inside = (r < rows)[:, None] & (c < cols)[None, :]
    return tl.load(ptr + r.to(tl.int64)[:, None] * stride + c[None, :], mask=inside, other=0.0)


@triton.jit
def _load_half(ptr, scale_ptr, r, c, col_block, rows, cols, CODES: tl.constexpr):
    """A tile of gate or up as float32, from values or from row codes."""
    value = _load_tile(ptr, r, c, rows, cols, cols).to(tl.float32)
    if CODES:
        value = value * tl.load(scale_ptr + col_block.to(tl.int64) * rows + r, mask=r < rows, other=1.0)[:, None]
    return value


@triton.jit
def _keep_largest(amax_ptr, largest, c, inside, cols):
    """Raise the maxima of one of the parts, so that few programs meet at the same address."""
    part = tl.program_id(0) % PARTS
    tl.atomic_max(amax_ptr + part * cols + c, largest, mask=inside, sem="relaxed")


@triton.jit
def _rows_kernel(
    x_ptr, codes_ptr, scale_ptr, amax_ptr, rows, cols, stride,
    AMAX: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    col_block = tl.program_id(1)
    c = col_block * 128 + tl.arange(0, 128)
    largest = tl.zeros([ROWS, 128], tl.int32)
    for step in range(STEPS):
        r = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        value = _load_tile(x_ptr, r, c, rows, cols, stride).to(tl.float32)
        magnitude = _store_rows(value, codes_ptr, scale_ptr, r, c, col_block, rows, cols)
        if AMAX:
            largest = tl.maximum(largest, magnitude)
    if AMAX:
        _keep_largest(amax_ptr, tl.max(largest, axis=0), c, c < cols, cols)


@triton.jit
def _norm_kernel(
    x_ptr, weight_ptr, codes_ptr, scale_ptr, amax_ptr, rstd_ptr, rows, cols, stride, eps,
    AMAX: tl.constexpr, STEPS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """STEPS rows one after another, each as [TILES, 128]."""
    tile = tl.arange(0, TILES)
    c = tile[:, None] * 128 + tl.arange(0, 128)[None, :]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + c, mask=c < cols, other=0.0).to(dtype).to(tl.float32)
    largest = tl.zeros([TILES, 128], dtype=tl.int32)
    for step in range(STEPS):
        r = (tl.program_id(0) * STEPS + step).to(tl.int64)
        inside = (c < cols) & (r < rows)
        x = tl.load(x_ptr + r * stride + c, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(tl.sum(x * x, axis=1), axis=0) / cols
        rstd = 1.0 / tl.sqrt_rn(mean + eps)
        value = (weight * (x * rstd).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        codes, scale, magnitude = _encode_rows(value)
        tl.store(codes_ptr + r * cols + c, codes, mask=inside)
        tl.store(scale_ptr + tile.to(tl.int64) * rows + r, scale, mask=(tile * 128 < cols) & (r < rows))
        tl.store(rstd_ptr + r, rstd, mask=r < rows)
        if AMAX:
            largest = tl.maximum(largest, magnitude)
    if AMAX:
        _keep_largest(amax_ptr, largest, c, c < cols, cols)


@triton.jit
def _swiglu_kernel(
    gate_up_ptr, codes_ptr, scale_ptr, kept_ptr, kept_scale_ptr, rows, inner,
    KEEP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    col_block = tl.program_id(1)
    up_block = col_block + inner // 128
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = col_block * 128 + tl.arange(0, 128)
    gate = _load_half(gate_up_ptr, gate_up_ptr, r, c, col_block, rows, 2 * inner, False)
    up = _load_half(gate_up_ptr, gate_up_ptr, r, c + inner, up_block, rows, 2 * inner, False)
    _store_rows(gate * _sigmoid(gate) * up, codes_ptr, scale_ptr, r, c, col_block, rows, inner)
    if KEEP:
        _store_rows(gate, kept_ptr, kept_scale_ptr, r, c, col_block, rows, 2 * inner)
        _store_rows(up, kept_ptr, kept_scale_ptr, r, c + inner, up_block, rows, 2 * inner)


@triton.jit
def _swiglu_backward_kernel(
    grad_ptr, gate_up_ptr, kept_scale_ptr,
    grad_codes_ptr, grad_scale_ptr, grad_amax_ptr, codes_ptr, scale_ptr, amax_ptr, rows, inner,
    CODES: tl.constexpr, AMAX: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    col_block = tl.program_id(1)
    up_block = col_block + inner // 128
    c = col_block * 128 + tl.arange(0, 128)
    largest = tl.zeros([ROWS, 128], tl.int32)
    largest_gate = tl.zeros([ROWS, 128], tl.int32)
    largest_up = tl.zeros([ROWS, 128], tl.int32)
    for step in tl.range(STEPS, num_stages=STAGES):  # the next tiles are fetched while one is worked on
        r = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        grad = _load_tile(grad_ptr, r, c, rows, inner, inner).to(tl.float32)
        gate = _load_half(gate_up_ptr, kept_scale_ptr, r, c, col_block, rows, 2 * inner, CODES)
        up = _load_half(gate_up_ptr, kept_scale_ptr, r, c + inner, up_block, rows, 2 * inner, CODES)
        sigmoid = _sigmoid(gate)
        silu = gate * sigmoid
        slope = sigmoid + silu * (1 - sigmoid)
        value = _store_rows(silu * up, codes_ptr, scale_ptr, r, c, col_block, rows, inner)
        grad_gate = _store_rows(grad * up * slope, grad_codes_ptr, grad_scale_ptr, r, c, col_block, rows, 2 * inner)
        grad_up = _store_rows(grad * silu, grad_codes_ptr, grad_scale_ptr, r, c + inner, up_block, rows, 2 * inner)
        if AMAX:
            largest = tl.maximum(largest, value)
            largest_gate = tl.maximum(largest_gate, grad_gate)
            largest_up = tl.maximum(largest_up, grad_up)
    if AMAX:
        _keep_largest(amax_ptr, tl.max(largest, axis=0), c, c < inner, inner)
        _keep_largest(grad_amax_ptr, tl.max(largest_gate, axis=0), c, c < inner, 2 * inner)
        _keep_largest(grad_amax_ptr + inner, tl.max(largest_up, axis=0), c, c < inner, 2 * inner)


# Shapes of the launches: rows of a tile of 128 columns, tiles of a strip, warps. Where column maxima are taken strips
# are long and tiles small: in one warp no reduction waits for another.
_PLAIN = {"ROWS": 16, "num_warps": 4}
_STRIP = {"ROWS": 8, "STEPS": 16, "num_warps": 2}
_BACKWARD = {"ROWS": 16, "STEPS": 8, "STAGES": 3, "num_warps": 4}
_BACKWARD_AMAX = {"ROWS": 4, "STEPS": 32, "STAGES": 4, "num_warps": 1}


def quantize_rows(x: Tensor, amax: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See ``rows.quantize_rows``."""
    x = _rows_contiguous(x)
    rows, cols = x.shape
    codes, scale, largest = _zeroed_rows(rows, cols, amax, x.device)
    shape = _STRIP if amax else {**_PLAIN, "STEPS": 1}
    _rows_kernel[_grid(rows, cols, shape)](x, codes, scale, _bits(largest), rows, cols, x.stride(0), AMAX=amax, **shape)
    return codes, scale, largest


def norm_quantize(x: Tensor, weight: Tensor, eps: float, amax: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``norm.norm_quantize``."""
    x = _rows_contiguous(x)
    rows, cols = x.shape
    codes, scale, largest = _zeroed_rows(rows, cols, amax, x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    tiles = triton.next_power_of_2(triton.cdiv(cols, BLOCK))
    steps = 16 if amax else 4 if rows > 2048 else 1
    _norm_kernel[(triton.cdiv(rows, steps),)](
        x, weight, codes, scale, _bits(largest), rstd, rows, cols, x.stride(0), eps,
        AMAX=amax, STEPS=steps, TILES=tiles, num_warps=2 if tiles <= 16 else 4,
    )  # fmt: skip
    return codes, scale, largest, rstd


def swiglu_quantize(gate_up: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``swiglu.swiglu_quantize``."""
    rows, inner = gate_up.shape[0], _whole_tiles(gate_up.shape[1] // 2)
    codes, scale, _ = empty_rows(rows, inner, False, gate_up.device)
    kept, kept_scale, _ = empty_rows(rows if keep else 0, 2 * inner, False, gate_up.device)
    _swiglu_kernel[_grid(rows, inner, _PLAIN)](
        gate_up.contiguous(), codes, scale, kept, kept_scale, rows, inner, KEEP=keep, **_PLAIN
    )
    return codes, scale, kept, kept_scale


def swiglu_backward_quantize(
    grad: Tensor, gate_up: Tensor, kept_scale: Tensor, amax: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``swiglu.swiglu_backward_quantize``."""
    rows, inner = grad.shape[0], _whole_tiles(grad.shape[1])
    grad_codes, grad_scale, grad_amax = _zeroed_rows(rows, 2 * inner, amax, grad.device)
    codes, scale, largest = _zeroed_rows(rows, inner, amax, grad.device)
    shape = _BACKWARD_AMAX if amax else _BACKWARD
    _swiglu_backward_kernel[_grid(rows, inner, shape)](
        grad.contiguous(), gate_up.contiguous(), kept_scale,
        grad_codes, grad_scale, _bits(grad_amax), codes, scale, _bits(largest), rows, inner,
        CODES=gate_up.dtype == torch.float8_e4m3fn, AMAX=amax, **shape,
    )  # fmt: skip
    return grad_codes, grad_scale, grad_amax, codes, scale, largest


def _grid(rows: int, cols: int, shape: dict[str, int]) -> tuple[int, int]:
    return triton.cdiv(rows, shape["ROWS"] * shape.get("STEPS", 1)), triton.cdiv(cols, BLOCK)


def _zeroed_rows(rows: int, cols: int, amax: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale, largest = empty_rows(rows, cols, amax, device)
    return codes, scale, largest.zero_() if amax else largest


def _bits(largest: Tensor) -> Tensor:
    """Maxima are taken on bits: an integer maximum also finds Inf and NaN, and needs no order."""
    return largest.view(torch.int32)


def _whole_tiles(inner: int) -> int:
    if inner % BLOCK:
        raise ValueError(f"the fused SwiGLU needs an inner size that is a multiple of {BLOCK}, got {inner}")
    return inner
