"""Triton kernel of top-k and top-p: what a row of logits may be cut to, without sorting it.

The tokens that stay are the first ones in the order of falling logits, of equal ones the lower id first. So two numbers
say which they are: the logit of the last one, and its id. ``_filter_kernel`` finds the logit by bisection: how many
tokens lie above a value (top-k), or how much probability (top-p), is a sum over the row. One program takes one row.
``sample_filter`` defines the result. Dividing by the temperature, which only the twin does before it compares, can
make unequal float32 logits equal: then which of the two stays is not defined. Sums within a chunk are float32, over
chunks float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 4096


@triton.jit
def order_key(x, WIDE: tl.constexpr):
    """A whole number for every float32, in the same order; of numbers that were bfloat16 (not WIDE) one of 16 bits."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 is made 0
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return key if WIDE else key >> 16


@triton.jit
def _above(
    logits_ptr, vocabulary, bound, top, inverse, MASS: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """Over tokens whose key is above ``bound``: how many there are, and (MASS) the sum of their exp."""
    count = tl.full([], 0, tl.int32)
    mass = tl.full([], 0.0, tl.float64)
    for start in range(0, vocabulary, SIZE):
        c = start + tl.arange(0, SIZE)
        x = tl.load(logits_ptr + c, mask=c < vocabulary, other=-float("inf")).to(tl.float32)
        above = (order_key(x, WIDE) > bound.to(tl.int32)) & (c < vocabulary)
        count += tl.sum(above.to(tl.int32), axis=0)
        if MASS:
            mass += tl.sum(tl.where(above, tl.exp((x - top) * inverse), 0.0), axis=0).to(tl.float64)
    return count, mass


@triton.jit
def _largest(logits_ptr, vocabulary, SIZE: tl.constexpr):
    top = tl.full([], -float("inf"), tl.float32)
    for start in range(0, vocabulary, SIZE):
        c = start + tl.arange(0, SIZE)
        x = tl.load(logits_ptr + c, mask=c < vocabulary, other=-float("inf")).to(tl.float32)
        top = tl.maximum(top, tl.max(x, axis=0))
    return top


@triton.jit
def _nth_equal(logits_ptr, vocabulary, key, n, WIDE: tl.constexpr, SIZE: tl.constexpr):
    """The id of the n-th token (from 1) whose key is ``key``; the vocabulary's size if there are not so many."""
    found = vocabulary
    before = tl.full([], 0, tl.int32)
    for start in range(0, vocabulary, SIZE):
        c = start + tl.arange(0, SIZE)
        x = tl.load(logits_ptr + c, mask=c < vocabulary, other=-float("inf")).to(tl.float32)
        equal = (order_key(x, WIDE) == key.to(tl.int32)) & (c < vocabulary)
        number = before + tl.cumsum(equal.to(tl.int32), axis=0)
        found = tl.minimum(found, tl.min(tl.where(equal & (number == n), c, vocabulary), axis=0))
        before += tl.sum(equal.to(tl.int32), axis=0)
    return found


@triton.jit
def _filter_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, key_ptr, last_ptr, vocabulary, stride,
    WIDE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Tokens stay whose key is above ``key``, or is it and whose id is at most ``last``."""
    row = tl.program_id(0)
    logits = logits_ptr + row.to(tl.int64) * stride
    temperature, top_p = tl.load(temperature_ptr + row), tl.load(top_p_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    by_k, by_p = (top_k > 0) & (top_k < vocabulary), top_p < 1.0
    steps: tl.constexpr = 32 if WIDE else 16
    lowest: tl.constexpr = -(2**31) if WIDE else -(2**15)
    highest: tl.constexpr = 2**31 - 1 if WIDE else 2**15 - 1
    key = tl.full([], lowest, tl.int64)
    last = vocabulary
    if (temperature > 0) & (by_k | by_p):
        inverse, top = 1.0 / temperature, _largest(logits, vocabulary, SIZE)
        n = tl.full([], vocabulary, tl.int64)  # of the tokens with the key: how many of them stay
        if by_k:
            # The largest key that at least k tokens reach.
            above = tl.full([], highest, tl.int64) + 1
            for _ in range(steps):
                middle = (key + above) >> 1
                count, _mass = _above(logits, vocabulary, middle - 1, top, inverse, False, WIDE, SIZE)
                enough = count >= top_k
                key, above = tl.where(enough, middle, key), tl.where(enough, above, middle)
            count, _mass = _above(logits, vocabulary, key, top, inverse, False, WIDE, SIZE)
            n = top_k - count
        if by_p:
            # Of what top-k leaves, the smallest key above which there is less than top_p of the probability.
            count, mass = _above(logits, vocabulary, key, top, inverse, True, WIDE, SIZE)
            if by_k:
                goal = top_p * (mass + n.to(tl.float64) * _weight_of(key, top, inverse, WIDE).to(tl.float64))
            else:
                goal = top_p * mass
            below = key - 1
            over = tl.full([], highest, tl.int64)
            for _ in range(steps):
                middle = (below + over) >> 1
                count, mass = _above(logits, vocabulary, middle, top, inverse, True, WIDE, SIZE)
                little = mass < goal
                over, below = tl.where(little, middle, over), tl.where(little, below, middle)
            count, mass = _above(logits, vocabulary, over, top, inverse, True, WIDE, SIZE)
            missing = (goal - mass) / _weight_of(over, top, inverse, WIDE).to(tl.float64)
            mine = tl.ceil(tl.minimum(missing, 1e9).to(tl.float64)).to(tl.int64)
            n = tl.maximum(tl.where(over == key, tl.minimum(n, mine), mine), 1)
            key = over
        last = _nth_equal(logits, vocabulary, key, n, WIDE, SIZE)
    tl.store(key_ptr + row, key.to(tl.int32))
    tl.store(last_ptr + row, last)


@triton.jit
def _weight_of(key, top, inverse, WIDE: tl.constexpr):
    """exp of the logit that has this key."""
    key = key.to(tl.int32)
    if not WIDE:
        key = (key << 16) | tl.where(key < 0, 0xFFFF, 0)
    value = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.exp((value - top) * inverse)


def limits(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """(key, last id), int32 [rows] each: see ``_filter_kernel``. Rows without top-k and top-p, or greedy, keep all.

    logits [rows, vocabulary], temperature float32, top_k int64 (0 keeps all), top_p float64 [rows].
    """
    rows, vocabulary = logits.shape
    key, last = torch.empty(2, rows, dtype=torch.int32, device=logits.device).unbind()
    _filter_kernel[(rows,)](
        logits, temperature, top_k, top_p, key, last, vocabulary, logits.stride(0),
        WIDE=logits.dtype == torch.float32, SIZE=_CHUNK, num_warps=8,
    )  # fmt: skip
    return key, last
