"""RMSNorm, RMSNorm with its output quantised to row codes in the same pass, and the backward pass of both.

    y = weight * (x * rstd),   rstd = 1 / sqrt(mean(x^2) + eps)

(Zhang, Sennrich: Root mean square layer normalization, 2019). The mean and rstd are float32; x * rstd and the product
with the weight are each rounded to the dtype of x, as Hugging Face's Qwen2 does. Backward everything is float32 until
the gradient of x, with the residual stream's gradient added to it, is rounded once. It computes rstd again, from x,
which it has to read anyway.
"""

from typing import Any

import torch
from torch import Tensor

from infir2.kernels.custom_op import custom_op
from infir2.kernels.dispatch import inference_on_cuda
from infir2.kernels.operand import empty_rows
from infir2.kernels.row_codes import encode_rows

BACKWARD_PARTS = 528
"""Programs of the backward kernel, whatever the device: the weight's gradient is the sum of so many partial sums."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., features] in any float dtype, weight [features] -> like x."""
    if inference_on_cuda(x):
        from infir2.kernels import norm_triton

        return norm_triton.rms_norm(x, weight, eps)
    return weight.to(x.dtype) * (x.float() * _rstd(x, eps)).to(x.dtype)


def fork(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x), x) for a residual branch: the branch reads the first, and what it makes is added to the second.

    One kernel then makes the gradient of x out of the branch's and the residual stream's. x [..., features].
    """
    return _Fork.apply(x, weight, eps)


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return rms_norm(x, weight, eps), x

    @staticmethod
    def backward(ctx: Any, grad: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        dx, dw = rms_norm_backward(grad.flatten(0, -2), x.flatten(0, -2), residual.flatten(0, -2), weight, ctx.eps)
        return dx.view(x.shape), dw, None


def rms_norm_backward(grad: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The gradient of x, with ``residual`` added, and that of the weight [features], in the dtype of each.

    grad: the gradient of rms_norm(x); residual: that of the residual stream, both like x [tokens, features].

        dx = rstd * (grad * weight - n * mean(grad * weight * n)) + residual,   dweight = sum over tokens of grad * n

    with n = x * rstd.
    """
    dx, parts = norm_gradients(grad, x, residual, weight, eps)
    return dx, parts.sum(dim=0).to(weight.dtype)


def _empty_norm_gradients(
    grad: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    rows, cols = x.shape
    return x.new_empty(rows, cols), x.new_empty(BACKWARD_PARTS if x.is_cuda else 1, cols, dtype=torch.float32)


@custom_op(_empty_norm_gradients)
def norm_gradients(grad: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See ``rms_norm_backward``; the weight's gradient as float32 rows to be added up, one on a CPU, else
    ``BACKWARD_PARTS``."""
    if x.is_cuda:
        from infir2.kernels import norm_triton

        return norm_triton.norm_gradients(grad, x, residual, weight, eps, BACKWARD_PARTS)
    rstd, wide = _rstd(x, eps), grad.float()
    normalised = x.float() * rstd
    pulled = wide * weight.to(x.dtype).float()
    along = (pulled * normalised).mean(dim=-1, keepdim=True)
    dx = (pulled - normalised * along) * rstd + residual.float()
    return dx.to(x.dtype), (wide * normalised).sum(dim=0, keepdim=True)


def _empty_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, amax: bool, update: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x.new_empty(0 if update is None else x.shape[0], x.shape[1])
    return *empty_rows(x.shape[0], x.shape[1], amax, x.device), total


@custom_op(_empty_norm_quantize)
def norm_quantize(
    x: Tensor, weight: Tensor, eps: float, amax: bool, update: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes, scale, amax) of rms_norm(x + update), as ``row_codes`` says, and x + update in the dtype of x.

    x and update [tokens, features], bfloat16 or float32. Without an update those of rms_norm(x), and a matrix without
    rows. amax: whether the columns' maxima are taken.
    """
    if x.is_cuda:
        from infir2.kernels import norm_triton

        return norm_triton.norm_quantize(x, weight, eps, amax, update)
    total = x if update is None else x + update
    return *encode_rows(rms_norm(total, weight, eps), amax), x.new_empty(0, x.shape[1]) if update is None else total


def _rstd(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + eps)
