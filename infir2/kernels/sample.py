"""From logits to tokens, and the log-probability of each token in the very distribution it was drawn from.

A token is drawn with one uniform number that is a function of (key of the sample, number of the token), see
``split_mix``: what else is in the batch, the order of the batch, and preemption cannot change it. The number is turned
into a token by the inverse of the cumulative distribution, always in the order of the vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from infir2.kernels.sample_filter import filter_logits
from infir2.kernels.split_mix import uniform


@dataclass(frozen=True)
class SamplingBatch:
    """Sampling parameters of a batch, one element a row of logits, on their device."""

    temperature: Tensor
    """float32; 0 is greedy."""
    top_k: Tensor
    """int64; 0 keeps all."""
    top_p: Tensor
    """float64; 1 keeps all."""
    keys: Tensor
    """int64: which stream of uniform numbers."""
    counters: Tensor
    """int64: number of the token within its sample."""
    filtered: bool = True
    """Whether any row may have top-k or top-p; known without looking at the device."""


@dataclass(frozen=True)
class Sampled:
    """What ``sample`` chose, one element a row."""

    tokens: Tensor
    """int64."""
    logprobs: Tensor
    """float32, in nats: in the distribution drawn from; for greedy rows the same as ``raw_logprobs``."""
    raw_logprobs: Tensor
    """float32: log-softmax of the logits."""


def sample(logits: Tensor, batch: SamplingBatch) -> Sampled:
    """Choose a token for every row of ``logits`` [rows, vocabulary] (any float dtype; computed in float32).

    Temperature comes first, then top-k, then top-p of what top-k leaves. A greedy row takes the largest logit.
    """
    if logits.is_cuda:
        from infir2.kernels import sample_triton

        filters = (batch.top_k, batch.top_p) if batch.filtered else ()
        return Sampled(*sample_triton.draw(logits, batch.temperature, batch.keys, batch.counters, *filters))
    logits = logits.float()
    greedy = batch.temperature == 0
    scaled = logits / torch.where(greedy, 1.0, batch.temperature)[:, None]
    scaled = filter_logits(scaled, batch.top_k, batch.top_p, greedy)
    normaliser = scaled.logsumexp(-1, keepdim=True)
    # Sums in float64: in float32 the rounding of 150,000 terms would be as large as the rare tokens' probabilities.
    cumulative = (scaled - normaliser).exp().cumsum(-1, dtype=torch.float64)
    target = uniform(batch.keys, batch.counters)[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)
    tokens = torch.where(greedy[:, None], logits.argmax(-1, keepdim=True), drawn)
    logprobs = scaled.gather(1, tokens) - normaliser
    raw = logits.gather(1, tokens) - logits.logsumexp(-1, keepdim=True)
    return Sampled(tokens.squeeze(1), torch.where(greedy[:, None], raw, logprobs).squeeze(1), raw.squeeze(1))
