"""From logits to tokens, and the log-probability of each token in the very distribution it was drawn from.

A token is drawn with one uniform number that is a function of (key of the sample, number of the token): what else is in
the batch, the order of the batch, and preemption cannot change it. The number is turned into a token by the inverse of
the cumulative distribution, always in the order of the vocabulary.
"""

from collections.abc import Sequence as List
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from infir2.rollout.records import SamplingParams
from infir2.rollout.upload import upload

# SplitMix64: a counter multiplied by an odd constant, then bits mixed by two multiplications.
_STEP = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


@dataclass(frozen=True)
class SamplingBatch:
    """Sampling parameters of a batch, one element a row of logits."""

    temperature: Tensor
    """float32; 0 is greedy."""
    top_k: Tensor
    """int64; 0 keeps all."""
    top_p: Tensor
    """float64."""
    keys: Tensor
    """int64, from ``random_key``."""
    counters: Tensor
    """int64: number of the token within its sample."""
    filtered: bool = True
    """Whether any row may have top-k or top-p; known without looking at the device."""

    @staticmethod
    def make(
        params: List[SamplingParams], keys: List[int], counters: List[int], device: torch.device | str
    ) -> "SamplingBatch":
        def column(values: list[float] | List[int], dtype: type) -> Tensor:
            return upload(np.array(values, dtype=dtype), torch.device(device))

        return SamplingBatch(
            temperature=column([p.temperature for p in params], np.float32),
            top_k=column([p.top_k for p in params], np.int64),
            top_p=column([p.top_p for p in params], np.float64),
            keys=column(keys, np.int64),
            counters=column(counters, np.int64),
            filtered=any(p.temperature > 0 and (p.top_k > 0 or p.top_p < 1) for p in params),
        )


@dataclass(frozen=True)
class Sampled:
    """What ``sample`` chose, one element a row."""

    tokens: Tensor
    """int64."""
    logprobs: Tensor
    """float32: in the distribution drawn from; for greedy rows the same as ``raw_logprobs``."""
    raw_logprobs: Tensor
    """float32: log-softmax of the logits."""


def random_key(seed: int, index: int) -> int:
    """A signed 64-bit key for sample ``index`` of a request with that seed (any whole number)."""
    return int.from_bytes(blake2b(f"{seed}:{index}".encode(), digest_size=8).digest(), "little", signed=True)


def uniform(keys: Tensor, counters: Tensor) -> Tensor:
    """float64 in [0, 1): number ``counter`` of the stream of each key, on the device of the keys."""
    z = keys + (counters + 1) * _signed(_STEP)  # int64 arithmetic wraps around, as SplitMix64 wants it
    for shift, factor in _MIX:
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    z = z ^ _shifted(z, 31)
    return _shifted(z, 11).double() * 2.0**-53


def sample(logits: Tensor, batch: SamplingBatch) -> Sampled:
    """Choose a token for every row of ``logits`` [rows, vocabulary] (any float dtype; computed in float32)."""
    if logits.is_cuda:
        from infir2.kernels import sample_triton

        filters = (batch.top_k, batch.top_p) if batch.filtered else ()
        return Sampled(*sample_triton.draw(logits, batch.temperature, batch.keys, batch.counters, *filters))
    logits = logits.float()
    greedy = batch.temperature == 0
    scaled = logits / torch.where(greedy, 1.0, batch.temperature)[:, None]
    scaled = _filtered(scaled, batch.top_k, batch.top_p, greedy)
    normaliser = scaled.logsumexp(-1, keepdim=True)
    # Sums in float64: in float32 the rounding of 150,000 terms would be as large as the rare tokens' probabilities.
    cumulative = (scaled - normaliser).exp().cumsum(-1, dtype=torch.float64)
    target = uniform(batch.keys, batch.counters)[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)
    tokens = torch.where(greedy[:, None], logits.argmax(-1, keepdim=True), drawn)
    logprobs = scaled.gather(1, tokens) - normaliser
    raw = logits.gather(1, tokens) - logits.logsumexp(-1, keepdim=True)
    return Sampled(tokens.squeeze(1), torch.where(greedy[:, None], raw, logprobs).squeeze(1), raw.squeeze(1))


def most_likely(logits: Tensor, counts: List[int]) -> list[tuple[tuple[int, float], ...]]:
    """For each row of ``logits`` [rows, vocabulary] its ``counts[row]`` most likely tokens as (id, log-softmax)."""
    found: list[tuple[tuple[int, float], ...]] = [()] * len(counts)
    if rows := [row for row, count in enumerate(counts) if count]:
        chosen = logits[torch.tensor(rows, device=logits.device)].float()
        values, ids = chosen.topk(min(max(counts), logits.shape[-1]), dim=-1)
        logprobs = values - chosen.logsumexp(-1, keepdim=True)  # as ``sample`` computes them
        for row, value, token in zip(rows, logprobs.tolist(), ids.tolist()):
            found[row] = tuple(zip(token, value))[: counts[row]]
    return found


def _filtered(scaled: Tensor, top_k: Tensor, top_p: Tensor, greedy: Tensor) -> Tensor:
    """-inf where top-k, or top-p of what top-k leaves, removes a token. Of equal logits the lower id is kept."""
    rows = (((top_k > 0) | (top_p < 1)) & ~greedy).nonzero().squeeze(1)
    if rows.numel() == 0:
        return scaled
    vocabulary = scaled.shape[-1]
    ordered, ids = scaled[rows].sort(dim=-1, descending=True, stable=True)
    k = torch.where(top_k[rows] > 0, top_k[rows], vocabulary)
    removed = torch.arange(vocabulary, device=scaled.device) >= k[:, None]
    probabilities = ordered.masked_fill(removed, -torch.inf).double().softmax(-1)
    # The mass in front of a token decides, so the first token always stays and the one that crosses top_p does too.
    removed |= (probabilities.cumsum(-1) - probabilities >= top_p[rows, None]) & (top_p[rows, None] < 1)
    removed[:, 0] = False
    scaled = scaled.clone()
    scaled[rows] = scaled[rows].masked_fill(torch.zeros_like(removed).scatter_(1, ids, removed), -torch.inf)
    return scaled


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned number."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shift right without copies of the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
