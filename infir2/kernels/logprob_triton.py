"""Triton kernels of what RL asks of a token: log-probability and entropy in one reading, their gradient in place.

The twins are in ``logprob``. Imported only where CUDA logits are met.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _token_statistics_kernel(
    logits_ptr, labels_ptr, logprob_ptr, entropy_ptr, lse_ptr, vocabulary, stride, temperature, SIZE: tl.constexpr
):  # fmt: skip
    """One row, float32 throughout: with x below the maximum m so far, the sums of e^(x - m) and of e^(x - m) (x - m)
    in every lane, joined at the end; entropy = log(first) - second / first."""
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * stride
    c = tl.arange(0, SIZE)
    largest = tl.full([SIZE], -3.0e38, tl.float32)
    total = tl.zeros([SIZE], tl.float32)
    moment = tl.zeros([SIZE], tl.float32)
    for start in range(0, vocabulary, SIZE):
        inside = start + c < vocabulary
        x = tl.load(logits + start + c, mask=inside, other=0.0).to(tl.float32) / temperature
        higher = tl.where(inside, tl.maximum(largest, x), largest)
        down, below = largest - higher, x - higher
        shrink, weight = tl.exp(down), tl.where(inside, tl.exp(below), 0.0)
        moment = shrink * tl.where(total > 0.0, moment + down * total, 0.0) + weight * below
        total = total * shrink + weight
        largest = higher
    top = tl.max(largest, axis=0)
    down = largest - top
    shrink = tl.where(total > 0.0, tl.exp(down), 0.0)
    moment = tl.sum(tl.where(total > 0.0, shrink * (moment + down * total), 0.0), axis=0)
    total = tl.sum(total * shrink, axis=0)
    lse = top + tl.log(total)
    target = tl.load(logits + tl.load(labels_ptr + row)).to(tl.float32) / temperature
    tl.store(logprob_ptr + row, target - lse)
    tl.store(entropy_ptr + row, tl.log(total) - moment / total)
    tl.store(lse_ptr + row, lse)


@triton.jit
def _token_gradient_kernel(
    logits_ptr, labels_ptr, lse_ptr, entropy_ptr, grad_ptr, grad_entropy_ptr, vocabulary, stride, temperature,
    GRAD: tl.constexpr, GRAD_ENTROPY: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    place, inside = logits_ptr + row * stride + c, c < vocabulary
    logprob = tl.load(place, mask=inside, other=0.0).to(tl.float32) / temperature - tl.load(lse_ptr + row)
    prob = tl.exp(logprob)
    gradient = tl.zeros([SIZE], tl.float32)
    if GRAD_ENTROPY:
        gradient -= tl.load(grad_entropy_ptr + row) * prob * (logprob + tl.load(entropy_ptr + row))
    if GRAD:
        hit = tl.where(c == tl.load(labels_ptr + row), 1.0, 0.0)
        gradient += tl.load(grad_ptr + row) * (hit - prob)
    tl.store(place, gradient / temperature, mask=inside)


def token_statistics(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """See ``logprob.token_statistics``."""
    rows, vocabulary = logits.shape
    logprob, entropy, lse = torch.empty(3, rows, dtype=torch.float32, device=logits.device).unbind()
    if rows:
        _token_statistics_kernel[(rows,)](
            logits, labels, logprob, entropy, lse, vocabulary, logits.stride(0), float(temperature),
            SIZE=4096, num_warps=8,
        )  # fmt: skip
    return logprob, entropy, lse


def token_gradient_(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    lse: Tensor,
    entropy: Tensor,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    """See ``logprob.token_gradient_``."""
    rows, vocabulary = logits.shape
    given = (None if g is None else g.contiguous() for g in (grad, grad_entropy))
    of_logprob, of_entropy = (lse if g is None else g for g in given)
    if rows:
        _token_gradient_kernel[(rows, triton.cdiv(vocabulary, 4096))](
            logits, labels, lse, entropy, of_logprob, of_entropy, vocabulary, logits.stride(0), float(temperature),
            GRAD=grad is not None, GRAD_ENTROPY=grad_entropy is not None, SIZE=4096, num_warps=8,
        )  # fmt: skip
