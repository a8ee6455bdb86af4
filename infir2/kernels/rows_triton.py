"""Triton kernel of row codes, and what the kernels that make row codes of something else (``norm_triton``,
``swiglu_triton``, ``cross_entropy_triton``) share with it.

Every kernel reads its input once. The twins that define the results are in ``rows``, ``norm`` and ``swiglu``. Imported
only where a CUDA tensor is quantised. These kernels are bound by instructions as much as by memory, so: a scale is a
power of two, and dividing by it is multiplying by its exact reciprocal; maxima are taken of floats, whose absolute
values cost nothing; four codes are made at a time and wiped by one mask where their block is not finite. Tiles are
small, so that many programs share a multiprocessor, and where column maxima are taken each program walks down a strip
of rows and keeps them in registers until its end. Inside a strip 32 bits hold every offset.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infir2.kernels.operand import AMAX_PARTS, empty_rows
from infir2.kernels.quantize_triton import _rows_contiguous
from infir2.kernels.reference import BLOCK

PARTS = tl.constexpr(AMAX_PARTS)


@triton.jit
def _larger(a, b):
    """The larger number; NaN where either is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _absolute(x):
    """|x|. As an operand of a maximum it costs nothing, which LLVM, left to itself, may not see."""
    return tl.inline_asm_elementwise("abs.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _wide(x):
    """x as float32. A bfloat16 number is the upper half of one, so of two in a word each takes one instruction."""
    if x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 high;
            and.b32 high, $2, 0xffff0000;
            shl.b32 $0, $2, 16;
            mov.b32 $1, high; }""",
            "=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return x.to(tl.float32)


@triton.jit
def _codes(value, factor, mask):
    """value * factor as e4m3, saturated, four at a time; bits where the mask has none are cleared."""
    return tl.inline_asm_elementwise(
        """{ .reg .f32 a, b; .reg .b16 low, high; .reg .b32 word;
        mul.f32 a, $1, $5;
        mul.f32 b, $2, $6;
        cvt.rn.satfinite.e4m3x2.f32 low, b, a;
        mul.f32 a, $3, $7;
        mul.f32 b, $4, $8;
        cvt.rn.satfinite.e4m3x2.f32 high, b, a;
        mov.b32 word, {low, high};
        and.b32 $0, word, $9; }""",
        "=r,f,f,f,f,f,f,f,f,r,r,r,r", [value, factor, mask], dtype=tl.float8e4nv, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _power_of_two(bits):
    """The bits of the scale of a block from those of its largest magnitude; see reference.scale_from_amax.

    448 is 1.75 * 2^8: adding what lies above 1.75 carries into the exponent where the mantissa is larger than that.
    """
    return tl.maximum(((bits + 0x1FFFFF) & 0x7F800000) - 0x04000000, 0x00800000)


@triton.jit
def _row_scales(largest):
    """Of the largest magnitude of every block: what its numbers are multiplied by, the bits that its codes keep (none
    where it is not finite), and its scale."""
    bits = largest.to(tl.int32, bitcast=True)
    power = _power_of_two(bits)
    finite = bits < 0x7F800000
    scale = tl.where(finite, tl.where(bits == 0, 0x3F800000, power), 0x7FC00000)
    factor = (0x7F000000 - power).to(tl.float32, bitcast=True)
    return factor, tl.where(finite, -1, 0), scale.to(tl.float32, bitcast=True)


@triton.jit
def _encode_rows(value, LANES: tl.constexpr = True):
    """Of a [rows, 128] float32 tile: codes, and of every row its scale and its largest magnitude, NaN if it has one.

    LANES: four codes that are made at a time lie in one row, as they do where the tile came by vector loads.
    """
    largest = tl.reduce(_absolute(value), 1, _larger)
    factor, mask, scale = _row_scales(largest)
    if not LANES:
        value = tl.where(mask[:, None] != 0, value, 0.0)
        mask = tl.full(mask.shape, -1, tl.int32)
    codes = _codes(value, tl.broadcast_to(factor[:, None], value.shape), tl.broadcast_to(mask[:, None], value.shape))
    return codes, scale, largest


@triton.jit
def _store_rows(value, codes_ptr, scale_ptr, r, c, inside, rows, stride, LANES: tl.constexpr = True):
    """Quantise a tile by rows and write its codes and its scales, which lie one below the other; the rows' maxima."""
    codes, scale, largest = _encode_rows(value, LANES)
    tl.store(codes_ptr + (r[:, None] * stride + c[None, :]), codes, mask=inside)
    tl.store(scale_ptr + r, scale, mask=r < rows)
    return largest


@triton.jit
def _raised(columns, rows, value, largest):
    """The largest magnitudes of every column and row so far, after a tile and its rows' maxima."""
    return _larger(columns, _absolute(value)), _larger(rows, largest)


@triton.jit
def _keep_largest(amax_ptr, columns, rows, c, inside, cols):
    """Raise one of the parts of amax, so that few programs meet at the same address.

    columns [rows, 128]: the largest magnitudes that each lane has seen. rows: those of the rows: if one of them is not
    finite, its block is not, and that makes all its columns NaN. As bits, which order like the numbers.
    """
    bits = tl.reduce(columns, 0, _larger).to(tl.int32, bitcast=True)
    finite = tl.reduce(rows, 0, _larger).to(tl.int32, bitcast=True) < 0x7F800000
    part = tl.program_id(0) % PARTS
    tl.atomic_max(amax_ptr + part * cols + c, tl.where(finite, bits, 0x7FC00000), mask=inside, sem="relaxed")


@triton.jit
def _rows_kernel(
    x_ptr, codes_ptr, scale_ptr, amax_ptr, rows, cols, stride,
    AMAX: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * (STEPS * ROWS)
    col_block = tl.program_id(1)
    c = col_block * 128 + tl.arange(0, 128)
    x_ptr += first.to(tl.int64) * stride
    codes_ptr += first.to(tl.int64) * cols
    scale_ptr += col_block.to(tl.int64) * rows + first
    columns = tl.zeros([ROWS, 128], tl.float32)
    highest = tl.zeros([ROWS], tl.float32)
    for step in tl.range(STEPS, num_stages=STAGES):
        r = step * ROWS + tl.arange(0, ROWS)
        inside = (r < rows - first)[:, None] & (c < cols)[None, :]
        value = _wide(tl.load(x_ptr + (r[:, None] * stride + c[None, :]), mask=inside, other=0.0))
        largest = _store_rows(value, codes_ptr, scale_ptr, r, c, inside, rows - first, cols, LANES)
        if AMAX:
            columns, highest = _raised(columns, highest, value, largest)
    if AMAX:
        _keep_largest(amax_ptr, columns, highest, c, c < cols, cols)


# Shapes of the launches: rows of a tile of 128 columns, tiles of a strip, tiles in flight, warps. With column maxima
# strips are long.
_PLAIN = {"ROWS": 16, "STEPS": 1, "STAGES": 1, "num_warps": 4}
_STRIP = {"ROWS": 4, "STEPS": 32, "STAGES": 3, "num_warps": 1}


def quantize_rows(x: Tensor, amax: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See ``rows.quantize_rows``."""
    x = _rows_contiguous(x)
    rows, cols = x.shape
    codes, scale, largest = zeroed_rows(rows, cols, amax, x.device)
    shape = _STRIP if amax else _PLAIN
    vectors = x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0
    _rows_kernel[grid(rows, cols, shape)](
        x, codes, scale, largest.view(torch.int32), rows, cols, x.stride(0), AMAX=amax, LANES=vectors, **shape
    )
    return codes, scale, largest


def grid(rows: int, cols: int, shape: dict[str, int]) -> tuple[int, int]:
    """Strips and blocks of 128 columns."""
    return triton.cdiv(rows, shape["ROWS"] * shape["STEPS"]), triton.cdiv(cols, BLOCK)


def zeroed_rows(rows: int, cols: int, amax: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Room for row codes, with maxima of zero."""
    codes, scale, largest = empty_rows(rows, cols, amax, device)
    return codes, scale, largest.zero_() if amax else largest
