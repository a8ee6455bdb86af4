"""Log-probabilities of tokens and entropies, from hidden states, without ever holding the logits of all tokens.

The head's GEMM and the softmax run over chunks of tokens. The backward pass makes each chunk's logits again.
"""

from typing import Any

import torch
from torch import Tensor

from infir2.kernels.logit_chunks import add_product, chunks


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
        for here in chunks(hidden.shape[0], weight.shape[0]):
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
        grad_weight: Tensor | None = None
        for here in chunks(hidden.shape[0], weight.shape[0]):
            logits = hidden[here] @ head.T
            of_logprob, of_entropy = (None if g is None else g[here] for g in (grad, grad_entropy))
            token_gradient_(logits, labels[here], ctx.temperature, lse[here], entropy[here], of_logprob, of_entropy)
            if grad_hidden is not None:
                torch.mm(logits, head, out=grad_hidden[here])
            if want_weight:
                grad_weight = add_product(grad_weight, logits, hidden[here], entropy.dtype)
        if want_weight and grad_weight is None:  # no tokens
            grad_weight = torch.zeros_like(weight)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def token_statistics(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of softmax(logits / temperature), every row: the label's log-probability, the entropy in nats, and the
    log-sum-exp; logits [rows, vocabulary] in any float dtype -> three tensors [rows] in at least float32.

    The division comes after the GEMM was rounded to the logits' dtype: as ``sample`` does.
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


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
