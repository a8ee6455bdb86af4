"""Triton kernels that draw one token a row of logits, by the inverse of the cumulative distribution.

``_sums_kernel`` reads the logits once: a program takes a chunk of a row's vocabulary and leaves its maximum and its
sums at temperature 1 and at the row's own temperature. ``_draw_kernel`` puts a row's chunks together, finds the chunk
at which the cumulative probability passes the row's uniform number, and in it the token. Sums within a chunk are
float32, over chunks float64. Where some rows have top-k or top-p, ``sample_filter_triton`` finds beforehand what stays
of each row. ``sample`` defines what is drawn.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infir2.kernels.sample_filter_triton import limits, order_key
from infir2.kernels.split_mix import MIX, STEP

_CHUNK = 4096
_STEP = tl.constexpr(STEP - (1 << 64))  # as a signed number
_MIX_30 = tl.constexpr(MIX[0][1])
_MIX_27 = tl.constexpr(MIX[1][1])


@triton.jit
def _staying(weight, x, c, key_ptr, last_ptr, row, FILTERED: tl.constexpr, WIDE: tl.constexpr):
    """The weights of tokens ``c`` with logits ``x``, 0 for those that top-k or top-p removes."""
    if FILTERED:
        key, limit = order_key(x, WIDE), tl.load(key_ptr + row)
        weight = tl.where((key > limit) | ((key == limit) & (c <= tl.load(last_ptr + row))), weight, 0.0)
    return weight


@triton.jit
def _sums_kernel(
    logits_ptr, temperature_ptr, key_ptr, last_ptr, top_ptr, place_ptr, raw_sum_ptr, sum_ptr, vocabulary, stride,
    FILTERED: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    c = chunk * SIZE + tl.arange(0, SIZE)
    inside = c < vocabulary
    x = tl.load(logits_ptr + row.to(tl.int64) * stride + c, mask=inside, other=-float("inf")).to(tl.float32)
    temperature = tl.load(temperature_ptr + row)
    top = tl.max(x, axis=0)
    logit = x
    x -= tl.where(top == -float("inf"), 0.0, top)  # a chunk may hold nothing that can be drawn
    out = row * chunks + chunk
    tl.store(top_ptr + out, top)
    tl.store(place_ptr + out, tl.min(tl.where(x == 0.0, c, vocabulary), axis=0))  # of equal logits the lowest id
    tl.store(raw_sum_ptr + out, tl.sum(tl.exp(x), axis=0))
    weight = tl.exp(x * (1.0 / tl.where(temperature == 0.0, 1.0, temperature)))
    weight = _staying(weight, logit, c, key_ptr, last_ptr, row, FILTERED, WIDE)
    tl.store(sum_ptr + out, tl.sum(weight, axis=0))


@triton.jit
def _uniform(key, counter):
    """See ``split_mix.uniform``."""
    z = (key + (counter + 1) * _STEP).to(tl.uint64, bitcast=True)
    z = (z ^ (z >> 30)) * _MIX_30
    z = (z ^ (z >> 27)) * _MIX_27
    z = z ^ (z >> 31)
    return (z >> 11).to(tl.int64, bitcast=True).to(tl.float64) * 2.0**-53


@triton.jit
def _draw_kernel(
    logits_ptr, temperature_ptr, seed_ptr, counter_ptr, key_ptr, last_ptr, top_ptr, place_ptr, raw_sum_ptr, sum_ptr,
    tokens_ptr, logprobs_ptr, raw_ptr, vocabulary, stride, chunks,
    FILTERED: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    greedy = temperature == 0.0
    inverse = 1.0 / tl.where(greedy, 1.0, temperature)
    i = tl.arange(0, CHUNKS)
    tops = tl.load(top_ptr + row * chunks + i, mask=i < chunks, other=-float("inf"))
    places = tl.load(place_ptr + row * chunks + i, mask=i < chunks, other=vocabulary)
    raw_sums = tl.load(raw_sum_ptr + row * chunks + i, mask=i < chunks, other=0.0)
    sums = tl.load(sum_ptr + row * chunks + i, mask=i < chunks, other=0.0)
    top = tl.max(tops, axis=0)
    best = tl.minimum(tl.min(tl.where(tops == top, places, vocabulary), axis=0), vocabulary - 1)  # if all are NaN
    raw_total = tl.sum((raw_sums * tl.exp(tops - top)).to(tl.float64), axis=0)
    masses = (sums * tl.exp((tops - top) * inverse)).to(tl.float64)
    cumulative = tl.cumsum(masses, axis=0)
    total = tl.max(cumulative, axis=0)
    target = _uniform(tl.load(seed_ptr + row), tl.load(counter_ptr + row)) * total
    chunk = tl.min(tl.where((cumulative > target) & (masses > 0), i, CHUNKS), axis=0)
    # A target that was rounded up to the total: then the last chunk, or below the last token, that can be drawn.
    chunk = tl.where(chunk < CHUNKS, chunk, tl.max(tl.where(masses > 0, i, 0), axis=0))
    before = tl.max(tl.where(i < chunk, cumulative, 0.0), axis=0)
    logits = logits_ptr + row.to(tl.int64) * stride
    c = chunk * SIZE + tl.arange(0, SIZE)
    x = tl.load(logits + c, mask=c < vocabulary, other=-float("inf")).to(tl.float32)
    weight = _staying(tl.exp((x - top) * inverse), x, c, key_ptr, last_ptr, row, FILTERED, WIDE)
    passed = before + tl.cumsum(weight, axis=0).to(tl.float64)
    first = tl.min(tl.where((passed > target) & (weight > 0), c, vocabulary), axis=0)
    last = tl.max(tl.where(weight > 0, c, 0), axis=0)
    token = tl.where(greedy, best, tl.where(first < vocabulary, first, last))
    chosen = tl.load(logits + token).to(tl.float32) - top
    raw = chosen - tl.log(raw_total.to(tl.float32))
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(raw_ptr + row, raw)
    tl.store(logprobs_ptr + row, tl.where(greedy, raw, chosen * inverse - tl.log(total.to(tl.float32))))


def draw(
    logits: Tensor,
    temperature: Tensor,
    keys: Tensor,
    counters: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``sample.sample``: tokens (int64), log-probabilities in the distribution drawn from, and at temperature 1.

    logits [rows, vocabulary] in any float dtype, temperature float32 [rows] (0 is greedy), keys and counters int64
    [rows]; with ``top_k`` int64 [rows] (0 keeps all) and ``top_p`` float64 [rows].
    """
    rows, vocabulary = logits.shape
    chunks, stride = triton.cdiv(vocabulary, _CHUNK), logits.stride(0)
    tops, raw_sums, sums = torch.empty(3, rows, chunks, dtype=torch.float32, device=logits.device).unbind()
    places = torch.empty(rows, chunks, dtype=torch.int32, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs, raw = torch.empty(2, rows, dtype=torch.float32, device=logits.device).unbind()
    filtered = top_k is not None and top_p is not None
    limit = limits(logits, temperature, top_k, top_p) if filtered else (tokens, tokens)
    shape = {"FILTERED": filtered, "WIDE": logits.dtype == torch.float32, "SIZE": _CHUNK}
    parts = (tops, places, raw_sums, sums)
    _sums_kernel[(rows, chunks)](logits, temperature, *limit, *parts, vocabulary, stride, **shape, num_warps=4)
    _draw_kernel[(rows,)](
        logits, temperature, keys, counters, *limit, *parts, tokens, logprobs, raw, vocabulary, stride, chunks,
        **shape, CHUNKS=triton.next_power_of_2(chunks), num_warps=8,
    )  # fmt: skip
    return tokens, logprobs, raw
