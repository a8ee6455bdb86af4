"""Triton functions that kernels share: FP8 codes and scales of numbers in registers, by the rules of ``reference``.

Each row has one scale, a power of two: dividing by it is multiplying by its exact reciprocal. There are two ways to the
same codes and scales:

- ``encode``, of rows of any width, in Triton's own operations: for heads, and for kernels of a few tokens.
- ``encode_tiles``, of rows of 128, for kernels over whole matrices, which are bound by instructions as much as by
  memory. So maxima are taken of floats, whose absolute values cost nothing, and four codes are made at a time and wiped
  by one mask where their row is not finite. With it comes the largest magnitude of every column of a matrix, the
  ``amax`` of row codes (see ``row_codes``).

``quantize_triton``, which also knows other scales, divides. Bits of magnitudes are int32: they order like the numbers,
Inf and NaN above every finite one.
"""

import triton
import triton.language as tl

from infir2.kernels import operand
from infir2.kernels.reference import BLOCK

AMAX_PARTS = tl.constexpr(operand.AMAX_PARTS)


@triton.jit
def magnitude_bits(value):
    """The bits of |value|, of float32."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_from_bits(bits, UE8M0: tl.constexpr):
    """Scales from the bits of amax; the same rules as reference.scale_from_amax."""
    if UE8M0:
        exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
        scale = (tl.maximum(exponent, 1) << 23).to(tl.float32, bitcast=True)
    else:
        floor_bits = tl.full([], 0x04E00000, tl.int32)  # AMAX_FLOOR = 448 * 2^-126
        amax = tl.maximum(bits, floor_bits).to(tl.float32, bitcast=True)
        scale = tl.div_rn(amax, tl.full(amax.shape, 448.0, tl.float32))
    scale = tl.where(bits == 0, 1.0, scale)
    nan = tl.full(scale.shape, 0x7FC00000, tl.int32).to(tl.float32, bitcast=True)
    return tl.where(bits >= 0x7F800000, nan, scale)


@triton.jit
def scale_and_reciprocal(bits):
    """Of rows with these bits of amax: the power-of-two scale, and its exact reciprocal, 0 if they are not finite."""
    scale = scale_from_bits(bits, True)
    reciprocal = (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    return scale, tl.where(bits < 0x7F800000, reciprocal, 0.0)


@triton.jit
def largest_bits(value):
    """The bits of the largest magnitude of every row [rows, any] float32."""
    return tl.max(magnitude_bits(value), axis=1)


@triton.jit
def codes_of(value, reciprocal):
    """The codes of rows, given the reciprocals of their scales; zeros where that is 0."""
    return tl.where(reciprocal[:, None] > 0, value * reciprocal[:, None], 0.0).to(tl.float8e4nv)


@triton.jit
def encode(value):
    """Codes and scales of rows [rows, any] float32."""
    scale, reciprocal = scale_and_reciprocal(largest_bits(value))
    return codes_of(value, reciprocal), scale


@triton.jit
def larger(a, b):
    """The larger number; NaN where either is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def absolute(x):
    """|x|. As an operand of a maximum it costs nothing, which LLVM, left to itself, may not see."""
    return tl.inline_asm_elementwise("abs.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def to_float32(x):
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
def tile_codes(value, factor, mask):
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
    """The bits of the scale of a row from those of its largest magnitude; see reference.scale_from_amax.

    448 is 1.75 * 2^8: adding what lies above 1.75 carries into the exponent where the mantissa is larger than that.
    """
    return tl.maximum(((bits + 0x1FFFFF) & 0x7F800000) - 0x04000000, 0x00800000)


@triton.jit
def tile_scales(largest):
    """Of the largest magnitude of every row: what its numbers are multiplied by, the bits that its codes keep (none
    where it is not finite), and its scale."""
    bits = largest.to(tl.int32, bitcast=True)
    power = _power_of_two(bits)
    finite = bits < 0x7F800000
    scale = tl.where(finite, tl.where(bits == 0, 0x3F800000, power), 0x7FC00000)
    factor = (0x7F000000 - power).to(tl.float32, bitcast=True)
    return factor, tl.where(finite, -1, 0), scale.to(tl.float32, bitcast=True)


@triton.jit
def encode_tiles(value, LANES: tl.constexpr = True):
    """Of rows [rows, 128] float32: codes, and of every row its scale and its largest magnitude, NaN if it has one.

    LANES: four codes that are made at a time lie in one row, as they do where the rows came by vector loads.
    """
    largest = tl.reduce(absolute(value), 1, larger)
    factor, mask, scale = tile_scales(largest)
    if not LANES:
        value = tl.where(mask[:, None] != 0, value, 0.0)
        mask = tl.full(mask.shape, -1, tl.int32)
    codes = tile_codes(
        value, tl.broadcast_to(factor[:, None], value.shape), tl.broadcast_to(mask[:, None], value.shape)
    )
    return codes, scale, largest


@triton.jit
def store_tiles(value, codes_ptr, scale_ptr, r, c, inside, rows, stride, LANES: tl.constexpr = True):
    """Encode rows [rows, 128] and write their codes and their scales, which lie one below the other; the rows' maxima
    come back."""
    codes, scale, largest = encode_tiles(value, LANES)
    tl.store(codes_ptr + (r[:, None] * stride + c[None, :]), codes, mask=inside)
    tl.store(scale_ptr + r, scale, mask=r < rows)
    return largest


@triton.jit
def raise_maxima(columns, rows, value, largest):
    """The largest magnitudes of every column and row so far, after ``value`` and its rows' maxima."""
    return larger(columns, absolute(value)), larger(rows, largest)


@triton.jit
def store_maxima(amax_ptr, columns, rows, c, inside, cols):
    """Raise one of the parts of amax, so that few programs meet at the same address.

    columns [rows, 128]: the largest magnitudes that each lane has seen. rows: those of the rows: if one of them is not
    finite, its tile is not, and that makes all its columns NaN. As bits, which order like the numbers.
    """
    bits = tl.reduce(columns, 0, larger).to(tl.int32, bitcast=True)
    finite = tl.reduce(rows, 0, larger).to(tl.int32, bitcast=True) < 0x7F800000
    part = tl.program_id(0) % AMAX_PARTS
    tl.atomic_max(amax_ptr + part * cols + c, tl.where(finite, bits, 0x7FC00000), mask=inside, sem="relaxed")


def strip_grid(rows: int, cols: int, shape: dict[str, int]) -> tuple[int, int]:
    """Programs of a kernel that walks down strips of STEPS times ROWS rows of 128 columns: strips, column blocks."""
    return triton.cdiv(rows, shape["ROWS"] * shape["STEPS"]), triton.cdiv(cols, BLOCK)
