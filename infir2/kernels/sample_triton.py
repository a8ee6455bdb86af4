"""Triton kernel that draws one token a row of logits, by the inverse of the cumulative distribution.

One program a row: a pass for the maximum and the sums at temperature 1 and at the row's own temperature, then a walk
over the tiles of the vocabulary to the tile, and in it to the token, at which the cumulative probability passes the
row's uniform number. Sums within a tile are float32, over tiles float64. ``rollout.sampler`` defines what is drawn.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _sums(logits, start, vocabulary, top, inverse, SIZE: tl.constexpr):
    """Sums of exp(x - top) and exp((x - top) / temperature) over one tile."""
    c = start + tl.arange(0, SIZE)
    x = tl.load(logits + c, mask=c < vocabulary, other=-float("inf")).to(tl.float32) - top
    return tl.sum(tl.exp(x), axis=0), tl.sum(tl.exp(x * inverse), axis=0)


@triton.jit
def _draw_kernel(
    logits_ptr, temperature_ptr, uniform_ptr, tokens_ptr, logprobs_ptr, raw_ptr, vocabulary, stride, SIZE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * stride
    temperature = tl.load(temperature_ptr + row)
    greedy = temperature == 0.0
    inverse = 1.0 / tl.where(greedy, 1.0, temperature)
    offsets = tl.arange(0, SIZE)
    largest = tl.full([SIZE], -float("inf"), tl.float32)
    place = tl.zeros([SIZE], tl.int32)
    for start in range(0, vocabulary, SIZE):
        c = start + offsets
        x = tl.load(logits + c, mask=c < vocabulary, other=-float("inf")).to(tl.float32)
        better = x > largest
        largest, place = tl.where(better, x, largest), tl.where(better, c, place)
    top = tl.max(largest, axis=0)
    best = tl.min(tl.where(largest == top, place, vocabulary), axis=0)  # of equal logits the lowest id
    raw_total = tl.zeros([], tl.float64)
    total = tl.zeros([], tl.float64)
    for start in range(0, vocabulary, SIZE):
        raw_sum, tile_sum = _sums(logits, start, vocabulary, top, inverse, SIZE)
        raw_total += raw_sum.to(tl.float64)
        total += tile_sum.to(tl.float64)
    target = tl.load(uniform_ptr + row) * total
    passed = tl.zeros([], tl.float64)
    before = tl.zeros([], tl.float64)
    found = tl.zeros([], tl.int32)
    tile = tl.zeros([], tl.int32)
    for start in range(0, vocabulary, SIZE):
        _, tile_sum = _sums(logits, start, vocabulary, top, inverse, SIZE)
        after = passed + tile_sum.to(tl.float64)
        here = (found == 0) & (after > target)
        tile, before = tl.where(here, start, tile), tl.where(here, passed, before)
        found = tl.where(here, 1, found)
        passed = after
    c = tile + offsets
    x = tl.load(logits + c, mask=c < vocabulary, other=-float("inf")).to(tl.float32) - top
    weight = tl.exp(x * inverse)
    cumulative = before + tl.cumsum(weight, axis=0).to(tl.float64)
    first = tl.min(tl.where((cumulative > target) & (weight > 0), c, vocabulary), axis=0)
    # The tile's sum and its running sum may round apart: then the last token of the tile that can be drawn.
    last = tl.max(tl.where(weight > 0, c, 0), axis=0)
    token = tl.where(greedy, best, tl.where(first < vocabulary, first, last))
    chosen = tl.load(logits + token).to(tl.float32) - top
    raw = chosen - tl.log(raw_total.to(tl.float32))
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(raw_ptr + row, raw)
    tl.store(logprobs_ptr + row, tl.where(greedy, raw, chosen * inverse - tl.log(total.to(tl.float32))))


def draw(logits: Tensor, temperature: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (int64), log-probabilities in the distribution drawn from, and at temperature 1 (float32), one a row.

    logits [rows, vocabulary] in any float dtype, temperature float32 [rows] (0 is greedy), uniform float64 [rows].
    """
    rows, vocabulary = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs, raw = torch.empty(2, rows, dtype=torch.float32, device=logits.device).unbind()
    _draw_kernel[(rows,)](
        logits, temperature, uniform, tokens, logprobs, raw, vocabulary, logits.stride(0), SIZE=4096, num_warps=8
    )
    return tokens, logprobs, raw
