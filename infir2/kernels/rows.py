"""Row codes: a matrix is quantised once, in 1x128 tiles with power-of-two scales, and both its GEMMs use those codes.

The forward GEMM (or the input gradient's) contracts along the rows. The weight gradient contracts along the tokens and
needs the transpose: ``transpose_rows`` (in ``transpose``) makes it from the codes, not from the matrix. A power of two
moves an e4m3 number to another scale exactly unless it becomes subnormal there, so nothing is rounded twice, half the
bytes are read, and only codes have to be kept for the backward pass. The weight gradient then multiplies what the
forward pass multiplied.

``amax`` of row codes is the largest |code * scale| of every column, float32 [cols]: what one scale a channel needs.
It is taken in the same pass where it is asked for, else it is empty.
"""

import torch
from torch import Tensor

from infir2.kernels import reference
from infir2.kernels.operand import empty_rows, with_layout


def encode_rows(x: Tensor, amax: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The twin: codes, scale and amax of ``x`` [rows, cols] in plain torch, laid out as ``operand`` says."""
    codes, scale = reference.quantize(x, "tile", "ue8m0")
    largest = x.new_empty(0, dtype=torch.float32)
    if amax:
        values = reference.dequantize(codes, scale, "tile").abs()
        largest = values.amax(dim=0) if len(values) else x.new_zeros(x.shape[1], dtype=torch.float32)
    return codes, with_layout(scale, "tile"), largest


@torch.library.custom_op("infir2::quantize_rows", mutates_args=())
def quantize_rows(x: Tensor, amax: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, amax) of ``x`` [rows, cols], bfloat16 or float32."""
    if not x.is_cuda:
        return encode_rows(x, amax)
    from infir2.kernels import rows_triton

    return rows_triton.quantize_rows(x, amax)


@quantize_rows.register_fake
def _(x: Tensor, amax: bool) -> tuple[Tensor, Tensor, Tensor]:
    return empty_rows(x.shape[0], x.shape[1], amax, x.device)
