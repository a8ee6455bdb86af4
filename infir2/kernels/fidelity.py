"""How well FP8 codes stand for the numbers that they were made of: five sums over an operand, in one pass over it."""

import torch
from torch import Tensor

from infir2.kernels import reference

_LARGEST = 0x7E  # the bits of 448


def fidelity(values: Tensor, codes: Tensor, scale: Tensor, granularity: str) -> Tensor:
    """Of an operand [rows, cols] (see ``reference``) and the ``values``, bfloat16 or float32, that it was made of.

    float64 [5]: how many values are not zero, how many of these have the code zero, how many codes are +-448, the sum
    of the squares of the values, and that of their differences to code * scale.
    """
    if values.is_cuda:
        from infir2.kernels import fidelity_triton

        return fidelity_triton.fidelity(values, codes, scale, granularity)
    wide, magnitude = values.float(), codes.view(torch.uint8) & 0x7F
    nonzero = wide != 0
    missed = wide - reference.dequantize(codes, scale, granularity)
    sums = (nonzero, nonzero & (magnitude == 0), magnitude == _LARGEST, wide.square(), missed.square())
    return torch.stack([part.sum(dtype=torch.float64) for part in sums])
