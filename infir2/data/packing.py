"""Token windows or whole documents to a Batch: shifted labels, positions and boundaries of packed documents."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from infir2.types import IGNORE, Batch

MULTIPLE = 128
"""Micro-batches of documents are rounded up to a multiple of this many tokens: the block of the FP8 GEMMs over them."""


@dataclass(frozen=True)
class Window:
    """One training sequence of T inputs."""

    tokens: NDArray[np.int64]
    """int64 [T + 1]: the inputs, and one more for the last label."""
    starts: NDArray[np.int64]
    """Places in 1..T at which a document begins, rising. The window's own beginning is not listed."""


def pack(windows: Sequence[Window], document_attention: bool) -> Batch:
    """One micro-batch [len(windows), T].

    With ``document_attention`` every document attends only to itself: positions restart, and the last token of a
    document has no label, because the next one belongs to a document it does not see. Without, a row is one document.
    """
    tokens = np.stack([window.tokens for window in windows])
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    labels = tokens[:, 1:].copy()
    positions = np.tile(np.arange(length, dtype=np.int64), (rows, 1))
    bounds = []
    for row, window in enumerate(windows):
        starts = window.starts if document_attention else window.starts[:0]
        labels[row, starts - 1] = IGNORE
        starts = np.concatenate([np.zeros(1, np.int64), starts[starts < length]])
        lengths = np.diff(starts, append=length)
        positions[row] -= np.repeat(starts, lengths)
        bounds.append(row * length + starts)
    cu_seqlens = np.concatenate([*bounds, np.array([rows * length])]).astype(np.int32)
    return Batch(
        input_ids=torch.from_numpy(tokens[:, :-1].copy()),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=int(np.diff(cu_seqlens).max()),
    )


def without_labels(batch: Batch, rows: slice) -> Batch:
    """The batch with no label in some rows: they fill up its shape and count for nothing."""
    labels = batch.labels.clone()
    labels[rows] = IGNORE
    return replace(batch, labels=labels)


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of at most ``capacity``, as indices into ``lengths``: longest first, each into the fullest bin with room.

    Equal lengths go in the order of their indices, and of bins with the same room the one that has had it longest is
    taken. Raises ValueError for a length that fits into no bin.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int, int]] = []  # (free, when that came to be, bin), rising
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for turn, index in enumerate(longest_first):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"a document of {length} tokens does not fit into {capacity}")
        place = bisect_left(room, (length, 0, 0))
        if place == len(room):
            free, chosen = capacity, len(bins)
            bins.append([])
        else:
            free, _, chosen = room.pop(place)
        bins[chosen].append(index)
        insort(room, (free - length, turn, chosen))
    return bins


def pack_documents(documents: Sequence[tuple[NDArray[np.int32], NDArray[np.bool_]]], multiple: int) -> Batch:
    """One micro-batch [1, n] of whole documents (ids, which of them are trained on) that attend only to themselves.

    A document of k tokens takes k - 1 places: its last token is only a label. n is rounded up to ``multiple``; the
    filling is a document of its own without labels. No document at all gives a batch of nothing but filling.
    """
    lengths = [len(ids) - 1 for ids, _ in documents]
    total = sum(lengths)
    size = max(1, -(-total // multiple)) * multiple
    input_ids, labels = np.zeros(size, np.int64), np.full(size, IGNORE, np.int64)
    positions = np.zeros(size, np.int64)
    bounds = [0]
    for length, (ids, trained) in zip(lengths, documents):
        here = slice(bounds[-1], bounds[-1] + length)
        input_ids[here] = ids[:-1]
        labels[here] = np.where(trained[1:], ids[1:], IGNORE)
        positions[here] = np.arange(length)
        bounds.append(here.stop)
    if size > total:
        positions[total:] = np.arange(size - total)
        bounds.append(size)
    return Batch(
        input_ids=torch.from_numpy(input_ids)[None],
        labels=torch.from_numpy(labels)[None],
        position_ids=torch.from_numpy(positions)[None],
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=max(b - a for a, b in pairwise(bounds)),
        filling=size - total,
    )
