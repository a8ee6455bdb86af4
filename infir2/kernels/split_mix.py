"""Uniform random numbers by SplitMix64: each is a function of a key and a counter, on every device the same.

Steele, Lea, Flood: Fast splittable pseudorandom number generators (OOPSLA 2014). A counter is multiplied by an odd
constant, then its bits are mixed by two multiplications.
"""

from torch import Tensor

STEP = 0x9E3779B97F4A7C15
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
"""Shifts and factors of the two mixing steps; a shift by 31 comes last."""


def uniform(keys: Tensor, counters: Tensor) -> Tensor:
    """float64 in [0, 1), multiples of 2^-53: number ``counter`` of the stream of each key, both int64 of one shape."""
    z = keys + (counters + 1) * _signed(STEP)  # int64 arithmetic wraps around, as SplitMix64 wants it
    for shift, factor in MIX:
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    z = z ^ _shifted(z, 31)
    return _shifted(z, 11).double() * 2.0**-53


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned number."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shift right without copies of the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
