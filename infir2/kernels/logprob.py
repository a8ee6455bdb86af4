"""From hidden states to token log-probabilities without ever holding the logits of all tokens.

A vocabulary of 152k makes the logits the largest tensor of a step. Here the head's GEMM, the softmax and their
gradients run over chunks of tokens; one pass makes the loss and its gradient, so no GEMM is done twice.
"""

from typing import Any

import torch
from torch import Tensor

_CHUNK_LOGITS = 1 << 27  # float32 logits held at a time: 512 MiB


def cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor, ignore: int = -100) -> Tensor:
    """Sum over tokens of -log softmax(hidden W^T)[label], float32 scalar; labels equal to ``ignore`` do not count.

    hidden [tokens, features] in bfloat16 or float32, weight [vocabulary, features], labels int64 [tokens]. The GEMMs
    run in hidden's dtype with float32 sums, the softmax in float32, the weight gradient is summed in float32.
    """
    return _CrossEntropySum.apply(hidden, weight, labels, ignore)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, ignore: int) -> Tensor:
        want_hidden, want_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        head = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        chunk = max(1, _CHUNK_LOGITS // weight.shape[0])
        for start in range(0, hidden.shape[0], chunk):
            h, label = hidden[start : start + chunk], labels[start : start + chunk]
            valid = label != ignore
            index = label.clamp(min=0)[:, None]
            logits = (h @ head.T).float()
            lse = logits.logsumexp(dim=-1, keepdim=True)
            nll = (lse - logits.gather(1, index)).squeeze(1)
            total += torch.where(valid, nll, 0.0).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            probs = logits.sub_(lse).exp_()
            probs.scatter_add_(1, index, torch.full_like(nll, -1.0)[:, None])
            grad_logits = probs.mul_(valid[:, None]).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + chunk] = grad_logits @ head
            if grad_weight is not None:
                grad_weight += grad_logits.T @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None
