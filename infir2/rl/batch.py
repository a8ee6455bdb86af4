"""From rollout to trainer: scored samples as packed micro-batches, with what the policy's loss needs of every token."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infir2.data.packing import MULTIPLE, best_fit_decreasing, pack_documents
from infir2.types import Batch


@dataclass(frozen=True)
class TrainingSample:
    """One response with its prompt, ready to be learnt from."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of the response's tokens, in the distribution that the engine drew them from."""
    advantage: float


@dataclass(frozen=True)
class RlBatch(Batch):
    """A packed micro-batch; labels are the responses' tokens. The tensors below are float32, shaped like labels, and
    mean something where a label is."""

    advantages: Tensor
    behaviour: Tensor
    """The engine's log-probabilities."""
    old: Tensor | None = None
    """The trainer's before the first update on this rollout; None: the first update is the only one, and its own
    log-probabilities are the old ones."""
    reference: Tensor | None = None
    """The frozen reference's; None without KL term."""


def pack_samples(samples: Sequence[TrainingSample], max_tokens: int) -> list[RlBatch]:
    """Micro-batches of at most ``max_tokens`` tokens (rounded up to MULTIPLE) that hold every sample once."""
    lengths = [len(s.prompt_ids) + len(s.response_ids) - 1 for s in samples]
    bins = best_fit_decreasing(lengths, max_tokens)
    return [_pack([samples[index] for index in sorted(chosen)]) for chosen in bins]


def split_samples(samples: Sequence[TrainingSample], parts: int) -> list[list[TrainingSample]]:
    """Consecutive samples in ``parts`` shares that differ by at most one sample."""
    bounds = [len(samples) * part // parts for part in range(parts + 1)]
    return [list(samples[a:b]) for a, b in pairwise(bounds)]


def dealt(batches: Sequence[RlBatch], rank: int, size: int) -> list[RlBatch]:
    """Those of one process among ``size``. All get as many: where there is one too few, one of filling alone."""
    mine = list(batches[rank::size])
    return mine if len(mine) * size >= len(batches) else [*mine, _pack([])]


@torch.no_grad()
def with_logprobs(batch: RlBatch, field: str, compute: Callable[[Batch], Tensor]) -> RlBatch:
    """The batch with ``compute(batch)`` as its ``old`` or ``reference`` log-probabilities."""
    values: dict[str, Any] = {field: compute(batch)}
    return dataclasses.replace(batch, **values)


def _pack(samples: Sequence[TrainingSample]) -> RlBatch:
    documents = []
    for sample in samples:
        ids = np.array(sample.prompt_ids + sample.response_ids, np.int32)
        documents.append((ids, np.arange(len(ids)) >= len(sample.prompt_ids)))
    batch = pack_documents(documents, MULTIPLE)
    advantages, behaviour = np.zeros((2, *batch.labels.shape), np.float32)
    end = 0
    for sample in samples:
        end += len(sample.prompt_ids) + len(sample.response_ids) - 1
        here = slice(end - len(sample.response_ids), end)
        advantages[0, here] = sample.advantage
        behaviour[0, here] = sample.logprobs
    tensors = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return RlBatch(**tensors, advantages=torch.from_numpy(advantages), behaviour=torch.from_numpy(behaviour))
