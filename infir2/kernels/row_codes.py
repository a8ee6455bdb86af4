"""Row codes: a matrix is quantised once, in 1x128 tiles with power-of-two scales, and both its GEMMs use those codes.

The forward GEMM (or the input gradient's) contracts along the rows. The weight gradient contracts along the tokens and
needs the transpose: ``transpose_rows`` (in ``transpose``) makes it from the codes, not from the matrix. A power of two
moves an e4m3 number to another scale exactly unless it becomes subnormal there, or was rounded beyond 448 times a
channel's scale. So next to nothing is rounded twice, half the bytes are read, and only codes have to be kept for the
backward pass. The weight gradient then multiplies what the forward pass multiplied.

``amax`` of row codes [AMAX_PARTS, cols] float32 holds what one scale a channel needs: the maximum of its rows is the
largest |x| of every column before it was quantised, NaN where a block of the column is not finite. It is taken in the
same pass where it is asked for; else it has no columns.
"""

import torch
from torch import Tensor

from infir2.kernels import reference
from infir2.kernels.custom_op import custom_op
from infir2.kernels.operand import AMAX_PARTS, empty_rows, with_layout


def encode_rows(x: Tensor, amax: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The twin: (codes, scale, amax) of ``x`` [rows, cols], bfloat16 or float32, laid out as ``operand`` says."""
    codes, scale = reference.quantize(x, "tile", "ue8m0")
    largest = torch.zeros(AMAX_PARTS, x.shape[1] if amax else 0, dtype=torch.float32, device=x.device)
    if amax and len(x):
        finite = scale.repeat_interleave(reference.BLOCK, dim=1)[:, : x.shape[1]].isfinite()
        largest[0] = torch.where(finite, x.float().abs(), torch.nan).amax(dim=0)
    return codes, with_layout(scale, "tile"), largest


def _empty_quantize_rows(x: Tensor, amax: bool) -> tuple[Tensor, Tensor, Tensor]:
    return empty_rows(x.shape[0], x.shape[1], amax, x.device)


@custom_op(_empty_quantize_rows)
def quantize_rows(x: Tensor, amax: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, amax) of ``x`` [rows, cols], bfloat16 or float32; amax: whether the columns' maxima are taken."""
    if not x.is_cuda:
        return encode_rows(x, amax)
    from infir2.kernels import row_codes_triton

    return row_codes_triton.quantize_rows(x, amax)
