"""Cross-entropy from hidden states without ever holding the logits of all tokens.

The head's GEMM, the softmax and their gradients run over chunks of tokens; one pass makes the loss and its gradient, so
no GEMM is done twice.
"""

from typing import Any

import torch
from torch import Tensor

from infir2.kernels.matmul import pad_tokens, scaled_mm
from infir2.kernels.quantize import quantize
from infir2.kernels.rows import encode_rows, quantize_rows
from infir2.kernels.transpose import transpose_operand
from infir2.kernels.vocabulary import add_product_, chunks

Codes = tuple[Tensor, Tensor]
"""Row codes and their scales."""


def cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor, ignore: int = -100, fp8: bool = False) -> Tensor:
    """Sum over tokens of -log softmax(hidden W^T)[label], float32 scalar; labels equal to ``ignore`` do not count.

    hidden [tokens, features] in bfloat16 or float32, weight [vocabulary, features], labels int64 [tokens]. The GEMMs
    run in hidden's dtype with float32 sums, the softmax in float32, the weight gradient is summed in float32.

    fp8: the logits and the gradient of ``hidden`` are made by FP8 GEMMs, hidden and the logits' gradient in 1x128
    tiles, the weight in 128x128 blocks; the weight gradient stays as it is.
    """
    return _CrossEntropySum.apply(hidden, weight, labels, ignore, fp8)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, ignore: int, fp8: bool) -> Tensor:
        want_hidden, want_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        head = _Fp8Head(weight, want_hidden) if fp8 else _Head(weight.to(hidden.dtype))
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for here in chunks(hidden.shape[0], weight.shape[0]):
            logits = head.logits(hidden[here])
            encode = fp8 and want_hidden
            nll, codes = softmax_gradient_(logits, labels[here], ignore, want_hidden or want_weight, encode)
            total += nll.sum()
            if grad_hidden is not None:
                head.input_gradient(logits, codes, grad_hidden[here])
            if grad_weight is not None:
                add_product_(grad_weight, logits, hidden[here])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


class _Head:
    """The two GEMMs with the head's weight, in its dtype."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight.T

    def input_gradient(self, grad: Tensor, codes: Codes | None, out: Tensor) -> None:
        torch.mm(grad, self.weight, out=out)


class _Fp8Head:
    """The same in FP8, of a weight whose codes are made anew for every batch."""

    def __init__(self, weight: Tensor, backward: bool) -> None:
        self.codes, self.scale = quantize(weight.to(torch.bfloat16), "block", "ue8m0", False)
        self.transposed = transpose_operand(self.codes, self.scale, "block") if backward else None

    def logits(self, hidden: Tensor) -> Tensor:
        codes, scale, _ = quantize_rows(pad_tokens(hidden), False)
        return scaled_mm(codes, scale, "tile", self.codes, self.scale, "block", hidden.dtype)[: len(hidden)]

    def input_gradient(self, grad: Tensor, codes: Codes | None, out: Tensor) -> None:
        assert codes is not None
        assert self.transposed is not None
        out.copy_(scaled_mm(*codes, "tile", *self.transposed, "block", out.dtype)[: len(out)])


def softmax_gradient_(
    logits: Tensor, labels: Tensor, ignore: int, gradient: bool, encode: bool = False
) -> tuple[Tensor, Codes | None]:
    """-log softmax(logits)[label] of every row, float32 [rows], 0 where the label equals ``ignore``; and, with
    ``encode``, row codes and scales of the gradient, of whole tiles of rows on a GPU.

    With ``gradient`` the logits [rows, vocabulary] are overwritten by the gradient of the sum of that, softmax - onehot
    (0 in ignored rows), computed in float32 and rounded to their dtype. Codes are made of the float32 numbers.
    """
    if logits.is_cuda:
        from infir2.kernels import cross_entropy_triton

        return cross_entropy_triton.softmax_gradient_(logits, labels, ignore, gradient, encode)
    valid, index = labels != ignore, labels.clamp(min=0)[:, None]
    wide = logits.float()
    lse = wide.logsumexp(dim=-1, keepdim=True)
    nll = torch.where(valid, (lse - wide.gather(1, index)).squeeze(1), 0.0)
    codes = None
    if gradient:
        probs = wide.sub_(lse).exp_()
        probs.scatter_add_(1, index, torch.full_like(lse, -1.0))
        logits.copy_(probs.mul_(valid[:, None]))
        codes = encode_rows(probs, False)[:2] if encode else None
    return nll, codes
