"""RMSNorm, and RMSNorm with its output quantised to row codes in the same pass.

    y = weight * (x * rstd),   rstd = 1 / sqrt(mean(x^2) + eps)

The mean and rstd are float32; x * rstd and the product with the weight are each rounded to the dtype of x, as Hugging
Face's Qwen2 does.
"""

import torch
from torch import Tensor

from infir2.kernels.custom_op import custom_op
from infir2.kernels.forward_only import forward_only
from infir2.kernels.operand import empty_rows
from infir2.kernels.rows import encode_rows


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., features] in any float dtype, weight [features] -> like x."""
    if forward_only(x):
        from infir2.kernels import forward_only_triton

        return forward_only_triton.rms_norm(x, weight, eps)
    return weight.to(x.dtype) * (x.float() * _rstd(x, eps)).to(x.dtype)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x (in its dtype) and of the weight (float32); grad and x [tokens, features], rstd [tokens]."""
    normalised = x.float() * rstd[:, None]
    wide = grad.float()
    pulled = wide * weight.to(x.dtype).float()
    along = (pulled * normalised).mean(dim=-1, keepdim=True)
    return ((pulled - normalised * along) * rstd[:, None]).to(x.dtype), (wide * normalised).sum(dim=0)


def _empty_norm_quantize(x: Tensor, weight: Tensor, eps: float, amax: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *empty_rows(x.shape[0], x.shape[1], amax, x.device), x.new_empty(x.shape[0], dtype=torch.float32)


@custom_op(_empty_norm_quantize)
def norm_quantize(x: Tensor, weight: Tensor, eps: float, amax: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes, scale, amax, rstd) of rms_norm(x), x [tokens, features]; the first three as ``rows`` says."""
    if not x.is_cuda:
        return *encode_rows(rms_norm(x, weight, eps), amax), _rstd(x, eps).squeeze(-1)
    from infir2.kernels import rows_triton

    return rows_triton.norm_quantize(x, weight, eps, amax)


def _rstd(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + eps)
