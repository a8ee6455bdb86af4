"""Stochastic rounding to bfloat16: up or down with the probabilities that make the result right on average.

The noise is no generator's, but a hash of a key and of the element's index: it can be made anywhere, in any order.
"""

from typing import TypeVar

import torch
from torch import Tensor

MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
"""Of a 32-bit hash that mixes well (hash-prospector's lowbias32)."""
_LOW = 0xFFFFFFFF
_Integer = TypeVar("_Integer", int, Tensor)


def scramble(x: _Integer) -> _Integer:
    """A 32-bit number, or int64 tensor of such, in which every bit depends on every bit of ``x``."""
    x = ((x ^ (x >> 16)) * MULTIPLIERS[0]) & _LOW
    x = ((x ^ (x >> 15)) * MULTIPLIERS[1]) & _LOW
    return x ^ (x >> 16)


def random_bits(like: Tensor, key: int, first: int) -> Tensor:
    """32 bits for every element: int64, shaped like ``like``, whose first element has the index ``first``."""
    index = torch.arange(first, first + like.numel(), device=like.device).view(like.shape)
    return scramble((index & _LOW) ^ key)


def round_to_bfloat16(x: Tensor, noise: Tensor) -> Tensor:
    """float32 ``x`` up or down to the next bfloat16: away from zero where ``noise`` exceeds what is missing.

    noise: int64 of the same shape, from 0 to 2^16 - 1. Inf and NaN stay what they are.
    """
    bits = x.view(torch.int32)
    finite = (bits & 0x7F800000) != 0x7F800000
    return ((bits + (noise * finite).int()) & -0x10000).view(torch.float32).bfloat16()
