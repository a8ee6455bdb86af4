"""Triton kernel of the cross-entropy: logits to their gradient, in place, reading them twice and writing them once.

The twin is ``cross_entropy.softmax_gradient_``. Imported only where CUDA logits are met.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infir2.kernels.operand import empty_rows
from infir2.kernels.reference import BLOCK
from infir2.kernels.rows_triton import _encode_rows


@triton.jit
def _softmax_gradient_kernel(
    logits_ptr, labels_ptr, nll_ptr, codes_ptr, scale_ptr, rows, vocabulary, stride, ignore,
    GRADIENT: tl.constexpr, ENCODE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
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
        tile = tl.arange(0, SIZE // 128)
        place = tile[:, None] * 128 + tl.arange(0, 128)[None, :]
        for start in range(0, vocabulary, SIZE):
            inside = start + place < vocabulary
            x = tl.load(logits + start + place, mask=inside, other=-float("inf")).to(tl.float32)
            gradient = tl.exp(x - lse) - tl.where(start + place == label, 1.0, 0.0)
            gradient = tl.where(valid, gradient, 0.0)
            tl.store(logits + start + place, gradient, mask=inside)
            if ENCODE:
                codes, scale, _ = _encode_rows(gradient)
                tl.store(codes_ptr + row * vocabulary + start + place, codes, mask=inside)
                first = start // 128 + tile
                tl.store(scale_ptr + first.to(tl.int64) * rows + row, scale, mask=first * 128 < vocabulary)


def softmax_gradient_(
    logits: Tensor, labels: Tensor, ignore: int, gradient: bool, encode: bool
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """See ``cross_entropy.softmax_gradient_``."""
    tokens, vocabulary = logits.shape
    nll = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    rows = tokens + -tokens % BLOCK if encode else 0
    codes, scale, _ = empty_rows(rows, vocabulary, False, logits.device)
    codes[tokens:].view(torch.uint8).zero_()
    scale[tokens:] = 1.0
    _softmax_gradient_kernel[(tokens,)](
        logits, labels, nll, codes, scale, rows, vocabulary, logits.stride(0), ignore,
        GRADIENT=gradient, ENCODE=encode, SIZE=8192, num_warps=8,
    )  # fmt: skip
    return nll, (codes, scale) if encode else None
