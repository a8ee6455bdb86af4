"""What every loss over a vocabulary shares: chunks of tokens, and the head's weight gradient summed over them.

A vocabulary of 152k makes the logits the largest tensor of a step, so they are made for some tokens at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from infir2.kernels.reference import BLOCK

CHUNK_LOGITS = 1 << 28
"""Logits held at a time: 512 MiB in bfloat16."""


def chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    """Slices of the tokens, whole tiles of 128 where they are that many, with no more logits than that."""
    size = CHUNK_LOGITS // vocabulary
    size = max(size - size % BLOCK, min(size, BLOCK), 1)  # whole tiles of FP8 rows
    for start in range(0, tokens, size):
        yield slice(start, start + size)


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left.T @ right in float32; on a GPU inside the GEMM, without rounding the product to bfloat16."""
    if total.is_cuda and left.dtype != total.dtype:
        torch.addmm(total, left.T, right, out_dtype=total.dtype, out=total)
    else:
        total += left.T @ right
