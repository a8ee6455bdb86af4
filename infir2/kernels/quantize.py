"""The one quantiser: a matrix to FP8 codes and scales, for the trainer, the exporter and whatever else needs FP8.

``quantize`` makes one operand; ``quantize_both`` makes, in one pass over the matrix where it can, the operand and the
operand of its transpose. Both are torch custom ops, so that torch.compile keeps them whole. CUDA tensors go through
Triton, all others through ``reference``, which defines the result bit for bit.

How codes and scales lie in memory: see ``operand``.
"""

from torch import Tensor

from infir2.kernels import reference
from infir2.kernels.custom_op import custom_op
from infir2.kernels.operand import empty_operand, with_layout
from infir2.kernels.transpose import transpose_operand


def _empty_quantize(x: Tensor, granularity: str, scale_format: str, transpose: bool = False) -> tuple[Tensor, Tensor]:
    rows, cols = (x.shape[1], x.shape[0]) if transpose else x.shape
    return empty_operand(rows, cols, granularity, x.device)


@custom_op(_empty_quantize)
def quantize(x: Tensor, granularity: str, scale_format: str, transpose: bool = False) -> tuple[Tensor, Tensor]:
    """Codes (float8_e4m3fn) and scales (float32) of ``x`` [rows, cols], or of x.T with ``transpose``.

    ``x`` is bfloat16 or float32. Granularities, scale formats and rules: see ``reference``.
    """
    if not x.is_cuda:
        codes, scale = reference.quantize(x, granularity, scale_format, transpose)
        return codes, with_layout(scale, granularity)
    from infir2.kernels import quantize_triton

    if granularity == "block" and transpose:
        return transpose_operand(*quantize_triton.quantize(x, granularity, scale_format, False), granularity)
    return quantize_triton.quantize(x, granularity, scale_format, transpose)


def _empty_quantize_both(
    x: Tensor, granularity: str, transposed_granularity: str, scale_format: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, cols = x.shape
    return (
        *empty_operand(rows, cols, granularity, x.device),
        *empty_operand(cols, rows, transposed_granularity, x.device),
    )


@custom_op(_empty_quantize_both)
def quantize_both(
    x: Tensor, granularity: str, transposed_granularity: str, scale_format: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes, scale) of ``x`` [rows, cols], bfloat16 or float32, followed by (codes, scale) of x.T [cols, rows]."""
    if x.is_cuda and granularity == transposed_granularity == "tile":
        from infir2.kernels import quantize_triton

        return quantize_triton.quantize_tiles_both(x, scale_format)
    return (
        *quantize(x, granularity, scale_format, False),
        *quantize(x, transposed_granularity, scale_format, True),
    )
