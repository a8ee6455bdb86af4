"""From hidden states to token log-probabilities without ever holding the logits of all tokens.

A vocabulary of 152k makes the logits the largest tensor of a step. Here the head's GEMM, the softmax and their
gradients run over chunks of tokens; one pass makes the loss and its gradient, so no GEMM is done twice.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from infir2.kernels.matmul import pad_tokens, scaled_mm
from infir2.kernels.quantize import quantize
from infir2.kernels.reference import BLOCK
from infir2.kernels.rows import encode_rows, quantize_rows
from infir2.kernels.transpose import transpose_operand

Codes = tuple[Tensor, Tensor]
"""Row codes and their scales."""
_CHUNK_LOGITS = 1 << 28  # logits held at a time: 512 MiB in bfloat16


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
        for here in _chunks(hidden.shape[0], weight.shape[0]):
            logits = head.logits(hidden[here])
            encode = fp8 and want_hidden
            nll, codes = softmax_gradient_(logits, labels[here], ignore, want_hidden or want_weight, encode)
            total += nll.sum()
            if grad_hidden is not None:
                head.input_gradient(logits, codes, grad_hidden[here])
            if grad_weight is not None:
                _add_product_(grad_weight, logits, hidden[here])
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
        from infir2.kernels import logprob_triton

        return logprob_triton.softmax_gradient_(logits, labels, ignore, gradient, encode)
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


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left.T @ right in float32; on a GPU inside the GEMM, without rounding the product to bfloat16."""
    if total.is_cuda and left.dtype != total.dtype:
        torch.addmm(total, left.T, right, out_dtype=total.dtype, out=total)
    else:
        total += left.T @ right


def token_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0, ignore: int = -100
) -> tuple[Tensor, Tensor]:
    """Log-probability of every label, and the entropy in nats, under softmax(hidden W^T / temperature).

    hidden [tokens, features], weight [vocabulary, features], labels int64 [tokens] -> two tensors [tokens] in float32
    (float64 where hidden is); both are 0, without gradient, where a label equals ``ignore``, and no logits are computed
    there. Dtypes as in ``cross_entropy_sum``. The backward pass computes each chunk's logits again instead of keeping
    them; a gradient of the entropy costs no more where nobody asks for it. ValueError for a temperature that is not
    positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature} is not positive")
    rows = (labels != ignore).nonzero().squeeze(1)
    logprobs, entropy = _TokenLogprobs.apply(hidden[rows], weight, labels[rows], temperature)
    zeros = logprobs.new_zeros(hidden.shape[0])
    return zeros.index_put((rows,), logprobs), zeros.index_put((rows,), entropy)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropy, lse = hidden.new_empty(3, hidden.shape[0], dtype=wide).unbind()
        head = weight.to(hidden.dtype)
        for here in _chunks(hidden.shape[0], weight.shape[0]):
            found = token_statistics(hidden[here] @ head.T, labels[here], temperature)
            logprobs[here], entropy[here], lse[here] = found
        ctx.save_for_backward(hidden, weight, labels, entropy, lse)
        ctx.temperature = temperature
        return logprobs, entropy

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, labels, entropy, lse = ctx.saved_tensors
        want_hidden, want_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        head = weight.to(hidden.dtype)
        grad_hidden = torch.zeros_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=entropy.dtype) if want_weight else None
        for here in _chunks(hidden.shape[0], weight.shape[0]):
            logits = hidden[here] @ head.T
            of_logprob, of_entropy = (None if g is None else g[here] for g in (grad, grad_entropy))
            token_gradient_(logits, labels[here], ctx.temperature, lse[here], entropy[here], of_logprob, of_entropy)
            if grad_hidden is not None:
                torch.mm(logits, head, out=grad_hidden[here])
            if grad_weight is not None:
                _add_product_(grad_weight, logits, hidden[here])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def token_statistics(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of softmax(logits / temperature), every row: the label's log-probability, the entropy in nats, and the
    log-sum-exp; logits [rows, vocabulary] in any float dtype -> three tensors [rows] in at least float32.

    The division comes after the GEMM was rounded to the logits' dtype: as the rollout's sampler does.
    """
    if logits.is_cuda:
        from infir2.kernels import logprob_triton

        return logprob_triton.token_statistics(logits, labels, temperature)
    scaled = _scaled(logits, temperature)
    all_logprobs = scaled.log_softmax(dim=-1)
    entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
    return all_logprobs.gather(1, labels[:, None]).squeeze(1), entropy, scaled.logsumexp(dim=-1)


def token_gradient_(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    lse: Tensor,
    entropy: Tensor,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    """Overwrite logits [rows, vocabulary] by the gradient of sum(grad * logprob + grad_entropy * entropy), where those
    are what ``token_statistics`` found, computed in at least float32; None stands for zeros.

    d logprob[y] / d logits = 1[y] - p;  d entropy / d logits = -p (log p + entropy); both over temperature.
    """
    if logits.is_cuda:
        from infir2.kernels import logprob_triton

        logprob_triton.token_gradient_(logits, labels, temperature, lse, entropy, grad, grad_entropy)
        return
    all_logprobs = _scaled(logits, temperature) - lse[:, None]
    probs = all_logprobs.exp()
    gradient = torch.zeros_like(probs)
    if grad_entropy is not None:
        gradient -= grad_entropy[:, None] * probs * (all_logprobs + entropy[:, None])
    if grad is not None:
        gradient -= probs.mul_(grad[:, None])
        gradient.scatter_add_(1, labels[:, None], grad[:, None].to(gradient.dtype))
    logits.copy_(gradient.div_(temperature))


def _chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    size = _CHUNK_LOGITS // vocabulary
    size = max(size - size % BLOCK, min(size, BLOCK), 1)  # whole tiles of FP8 rows
    for start in range(0, tokens, size):
        yield slice(start, start + size)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
