"""What every loss over a vocabulary shares: chunks of tokens, and the head's weight gradient summed over them.

A vocabulary of 152k makes the logits the largest tensor of a step, so they are made for some tokens at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from infir2.kernels.reference import BLOCK

CHUNK_LOGITS = 1 << 28
"""Logits held at a time: 512 MiB in bfloat16."""
HELD_CHUNKS = 10
"""Chunks of which an FP8 head holds transposed codes at a time: 2.5 GiB."""


def chunk_tokens(vocabulary: int) -> int:
    """How many tokens have no more logits than that: whole tiles of 128 FP8 rows where they are that many."""
    size = CHUNK_LOGITS // vocabulary
    return max(size - size % BLOCK, min(size, BLOCK), 1)


def chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    """Slices that cover all tokens, of ``chunk_tokens`` each but the last."""
    size = chunk_tokens(vocabulary)
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def add_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """total + left.T @ right in ``dtype``, in the memory of total, where that is not None.

    left [tokens, m], right [tokens, n] -> [m, n]. On a GPU the sum is made inside the GEMM, without rounding the
    product to the operands' dtype.
    """
    if not (left.is_cuda and left.dtype != dtype):
        product = (left.T @ right).to(dtype)
        return product if total is None else total.add_(product)
    if total is None:
        return torch.mm(left.T, right, out_dtype=dtype)
    return torch.addmm(total, left.T, right, out_dtype=dtype, out=total)
