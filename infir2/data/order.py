"""Which sample comes when: pure functions of the seed, with no state to save or restore.

A mixture is quantised to counts in blocks of 1024 samples, so global sample number n gives its source and its place
in that source's own sequence at once; every epoch of a source is a seeded permutation of its windows.

Only raw Philox words are used and sorted: numpy promises that these stay the same between releases, which it does
not for ``Generator.permutation``.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from infir2.errors import DataError

BLOCK = 1024
"""Samples over which the mixture's proportions are exact."""
# Keep the random streams of different purposes apart.
_MIXTURE, _EPOCH, _SHUFFLE, _ROWS, _HELD_OUT, _PROMPTS = 1, 2, 3, 4, 5, 6


def permutation(size: int, *key: int) -> NDArray[np.int64]:
    """A permutation of range(size), determined by the key (non-negative integers)."""
    words = np.random.Philox(np.random.SeedSequence(list(key))).random_raw(size)
    return np.argsort(words, kind="stable")


def shuffled_documents(count: int, seed: int) -> NDArray[np.int64]:
    """The order in which ``prepare --shuffle`` writes documents."""
    return permutation(count, seed, _SHUFFLE)


def shuffled_rows(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order in which one epoch of fine-tuning visits its rows."""
    return permutation(count, seed, _ROWS, epoch)


def shuffled_prompts(count: int, seed: int, stream: int, epoch: int) -> NDArray[np.int64]:
    """The order in which one epoch of a stream of reinforcement learning visits its prompts."""
    return permutation(count, seed, _PROMPTS, stream, epoch)


def held_out_rows(count: int, seed: int, fraction: float) -> NDArray[np.int64]:
    """Numbers of the rows that are held out, rising: at least one of two or more, unless ``fraction`` is 0."""
    wanted = max(1, round(count * fraction)) if fraction and count > 1 else 0
    return np.sort(permutation(count, seed, _HELD_OUT)[:wanted])


def in_validation(document: int, seed: int, fraction: float) -> bool:
    """Whether document number ``document`` of a corpus is held out: an independent draw for each, by hash."""
    digest = hashlib.blake2b(f"{seed}:{document}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers that sum to ``total``, in proportion to the weights (largest remainder, first wins a tie)."""
    shares = np.array(weights, np.float64) / sum(weights) * total
    counts = np.floor(shares).astype(int)
    order = np.argsort(-(shares - counts), kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return counts.tolist()


class Mixture:
    """Assigns global sample numbers to sources and to ordinals inside each source."""

    def __init__(self, names: Sequence[str], weights: Sequence[float], seed: int) -> None:
        self.counts = apportion(weights, BLOCK)
        self._seed = seed
        self._slots = np.repeat(np.arange(len(weights)), self.counts)
        self._block = lru_cache(maxsize=4)(self._make_block)
        for name, count in zip(names, self.counts):
            if not count:
                raise DataError(f"data.sources: {name}: its weight is too small: under 1/{2 * BLOCK} of the mixture")

    def place(self, sample: int) -> tuple[int, int]:
        """(source, ordinal of the sample among that source's samples) of a global sample number."""
        block, i = divmod(sample, BLOCK)
        sources, ranks = self._block(block)
        source = int(sources[i])
        return source, block * self.counts[source] + int(ranks[i])

    def _make_block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        sources = self._slots[permutation(BLOCK, self._seed, _MIXTURE, block)]
        ranks = np.zeros(BLOCK, np.int64)
        for source in range(len(self.counts)):
            here = sources == source
            ranks[here] = np.arange(np.count_nonzero(here))
        return sources, ranks


class EpochOrder:
    """The order in which one source's windows are visited: each once an epoch, another permutation each epoch."""

    def __init__(self, windows: int, seed: int, source: int) -> None:
        self._windows = windows
        self._key = (seed, _EPOCH, source)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def window(self, ordinal: int) -> int:
        """The window that the source's sample number ``ordinal`` holds."""
        epoch, i = divmod(ordinal, self._windows)
        return int(self._epoch(epoch)[i])

    def _make_epoch(self, epoch: int) -> NDArray[np.integer]:
        order = permutation(self._windows, *self._key, epoch)
        return order.astype(np.uint32) if self._windows <= 1 << 32 else order  # half the memory
