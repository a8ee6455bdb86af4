"""The end of a decoder layer's branch, where nothing is kept for a backward pass: the branch is added to the residual
stream, and the sum goes through the norm of the branch that follows, in one pass.

    residual' = residual + branch,   normed = rms_norm(residual')

``branch`` may be the partial sums of a product (see ``split_k``), which are then added on the way. It is rounded to the
dtype of the residual stream before it is added, and so is the sum: nothing changes but the number of passes.
"""

import torch
from torch import Tensor

from infir2.kernels.norm import norm_quantize, rms_norm
from infir2.kernels.operand import empty_operand
from infir2.kernels.split_k import PartialSums


def add_norm(residual: Tensor, branch: Tensor | PartialSums, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(residual', normed), like the residual [rows, features].

    ``branch`` [rows, features] in the same dtype, or its partial sums; weight [features].
    """
    if residual.is_cuda:
        from infir2.kernels import add_norm_triton

        out = torch.empty_like(residual)
        return add_norm_triton.add_norm(residual, branch, weight, eps, out, None), out
    residual = residual + _total(branch, residual.dtype)
    return residual, rms_norm(residual, weight, eps)


def add_norm_quantize(
    residual: Tensor, branch: Tensor | PartialSums, weight: Tensor, eps: float, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(residual', codes, scale): normed as row codes (see ``row_codes``), with room for ``rows`` rows.

    What follows the last row of the residual is not initialised. Arguments as in ``add_norm``.
    """
    codes, scale = empty_operand(rows, residual.shape[1], "tile", residual.device)
    if residual.is_cuda:
        from infir2.kernels import add_norm_triton

        return add_norm_triton.add_norm(residual, branch, weight, eps, codes, scale), codes, scale
    residual = residual + _total(branch, residual.dtype)
    count = residual.shape[0]
    found, found_scale, _, _ = norm_quantize(residual, weight, eps, False)
    codes[:count].view(torch.uint8).copy_(found.view(torch.uint8))
    scale[:count].copy_(found_scale)
    return residual, codes, scale


def _total(branch: Tensor | PartialSums, dtype: torch.dtype) -> Tensor:
    return branch.total(dtype) if isinstance(branch, PartialSums) else branch
