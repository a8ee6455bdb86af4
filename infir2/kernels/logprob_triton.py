"""Triton kernel of the cross-entropy: logits to their gradient, in place, reading them twice and writing them once.

The twin is ``logprob.softmax_gradient_``. Imported only where CUDA logits are met.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _softmax_gradient_kernel(
    logits_ptr, labels_ptr, nll_ptr, vocabulary, stride, ignore, GRADIENT: tl.constexpr, SIZE: tl.constexpr
):
    """One row: a maximum and a sum of exponentials in every lane, joined at the end; float32 throughout."""
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * stride
    label = tl.load(labels_ptr + row)
    valid = label != ignore
    c = tl.arange(0, SIZE)
    largest = tl.full([SIZE], -3.0e38, tl.float32)
    total = tl.zeros([SIZE], tl.float32)
    for start in range(0, vocabulary, SIZE):
        x = tl.load(logits + start + c, mask=start + c < vocabulary, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(largest, x)
        total = total * tl.exp(largest - higher) + tl.exp(x - higher)
        largest = higher
    top = tl.max(largest, axis=0)
    lse = top + tl.log(tl.sum(total * tl.exp(largest - top), axis=0))
    target = tl.load(logits + tl.where(valid, label, 0)).to(tl.float32)
    tl.store(nll_ptr + row, tl.where(valid, lse - target, 0.0))
    if GRADIENT:
        tl.debug_barrier()  # the target was read by every thread before anything is overwritten
        for start in range(0, vocabulary, SIZE):
            inside = start + c < vocabulary
            x = tl.load(logits + start + c, mask=inside, other=0.0).to(tl.float32)
            gradient = tl.exp(x - lse) - tl.where(start + c == label, 1.0, 0.0)
            tl.store(logits + start + c, tl.where(valid, gradient, 0.0), mask=inside)


def softmax_gradient_(logits: Tensor, labels: Tensor, ignore: int, gradient: bool) -> Tensor:
    """See ``logprob.softmax_gradient_``."""
    nll = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    _softmax_gradient_kernel[(logits.shape[0],)](
        logits, labels, nll, logits.shape[1], logits.stride(0), ignore, GRADIENT=gradient, SIZE=8192, num_warps=8
    )
    return nll
