"""Triton functions that make codes of rows in registers, each row with one power-of-two scale: heads for an FP8 cache,
and what goes from a kernel straight into an FP8 GEMM. Numbers are those of ``reference`` (``tile``, ue8m0).
"""

import triton
import triton.language as tl

from infir2.kernels.quantize_triton import _scale_from_bits


@triton.jit
def largest_bits(value):
    """The bits of the largest magnitude of every row [rows, any] float32: they order like numbers, NaN last."""
    return tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@triton.jit
def scale_of(bits):
    """Of rows with these largest bits: the scale, and what to multiply by instead of dividing, 0 if not finite."""
    scale = _scale_from_bits(bits, True)
    reciprocal = (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    return scale, tl.where(bits < 0x7F800000, reciprocal, 0.0)


@triton.jit
def codes_of(value, factor):
    """The codes of rows; zeros where the factor is 0."""
    return tl.where(factor[:, None] > 0, value * factor[:, None], 0.0).to(tl.float8e4nv)


@triton.jit
def encode(value):
    """Codes and scales of rows."""
    scale, factor = scale_of(largest_bits(value))
    return codes_of(value, factor), scale
