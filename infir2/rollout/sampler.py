"""Around drawing tokens, which ``infir2.kernels.sample`` defines: what it is given, and the likeliest tokens."""

from collections.abc import Sequence as List
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from infir2.kernels.sample import SamplingBatch
from infir2.rollout.records import SamplingParams
from infir2.rollout.upload import upload


def random_key(seed: int, index: int) -> int:
    """A signed 64-bit key for sample ``index`` of a request with that seed (any whole number)."""
    return int.from_bytes(blake2b(f"{seed}:{index}".encode(), digest_size=8).digest(), "little", signed=True)


def sampling_batch(
    params: List[SamplingParams], keys: List[int], counters: List[int], device: torch.device | str
) -> SamplingBatch:
    """One row for each of the parameters; keys from ``random_key``, counters: number of the token in its sample."""

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
