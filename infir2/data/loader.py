"""The data order f(seed, step): any optimiser step's batches, for any rank of any world size, with nothing to restore.

The tokens of a source's split are cut into windows of seq_len + 1 tokens, seq_len apart. Global sample n of the
mixture is one window (see order.py); step n takes samples [n * global_batch, (n + 1) * global_batch).
"""

import hashlib
import json
import logging
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from infir2.data.dataset import ShardFile, Split
from infir2.data.order import EpochOrder, Mixture, apportion
from infir2.data.packing import Window, pack, without_labels
from infir2.data.source import Source, open_source
from infir2.errors import DataError
from infir2.types import Batch

_log = logging.getLogger(__name__)


class TokenLoader:
    """Batches of a weighted mixture of sources.

    ``sources`` maps a prepared folder or Megatron prefix to its weight. ``vocab_size`` is the model's. Raises DataError
    for sources that cannot be read, are too short, or were made with different tokenizers or with more ids than the
    model has, and for batch sizes that do not divide.
    """

    def __init__(
        self,
        sources: Mapping[str, float],
        seq_len: int,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
        document_attention: bool = True,
        validation_fraction: float = 0.05,
        vocab_size: int | None = None,
        prefetch: int = 2,
    ) -> None:
        if global_batch % (micro_batch * world):
            raise DataError(
                f"train.global_batch ({global_batch}) is not a multiple of train.micro_batch x processes "
                f"({micro_batch} x {world} = {micro_batch * world})"
            )
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
        if not sources:
            raise DataError("data.sources: no source is named")
        self.weights = dict(sources)
        self.seq_len, self.seed = seq_len, seed
        self.global_batch, self.micro_batch, self.rank, self.world = global_batch, micro_batch, rank, world
        self.document_attention, self.prefetch = document_attention, prefetch
        self._validation_fraction = validation_fraction
        self._sources = [open_source(name, validation_fraction) for name in sources]
        for source in self._sources:
            _check_fit(source, vocab_size)
        _check_all_differ(self._sources)
        _check_one_tokenizer(self._sources)
        self._vocab = [source.vocab_size or vocab_size for source in self._sources]
        self._mixture = Mixture(list(sources), list(sources.values()), seed)
        self.windows = {source.name: self._windows(source, "train") for source in self._sources}
        self._orders = [EpochOrder(n, seed, index) for index, n in enumerate(self.windows.values())]
        for source in self._sources:
            if not self.windows[source.name]:
                raise DataError(f"{self._too_short(source, 'train')}. Prepare more text or shorten data.seq_len.")

    def step(self, n: int, offset: int = 0) -> list[Batch]:
        """This rank's micro-batches of optimiser step ``n``; ``offset`` = samples used before step 0.

        Micro-batch m holds samples offset + n * global_batch + (m * world + rank) * micro_batch + [0, micro_batch):
        all ranks together hold the same samples at every world size.
        """
        first = offset + n * self.global_batch
        stride = self.micro_batch * self.world
        starts = range(first + self.rank * self.micro_batch, first + self.global_batch, stride)
        return [
            pack([self._sample(start + i) for i in range(self.micro_batch)], self.document_attention)
            for start in starts
        ]

    def stream(self, first_step: int, last_step: int, offset: int = 0) -> Iterator[list[Batch]]:
        """``step(n)`` for n in [first_step, last_step), made ahead in a thread (``prefetch`` steps; 0 = no thread).

        An error in the thread is raised here. Closing the generator ends the thread.
        """
        if not self.prefetch:
            yield from (self.step(n, offset) for n in range(first_step, last_step))
            return
        ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(self.prefetch)
        stop = threading.Event()
        arguments = (first_step, last_step, offset, ready, stop)
        thread = threading.Thread(target=self._fill, args=arguments, name="data-prefetch", daemon=True)
        thread.start()
        try:
            for _ in range(first_step, last_step):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            while not ready.empty():  # make room, so that a blocked put sees the event
                ready.get_nowait()
            thread.join()

    def validation_batches(self, n_sequences: int) -> list[Batch]:
        """This rank's batches of the first ``n_sequences`` held-out windows, in proportion to the weights.

        Every rank gets the same number of full batches; rows beyond the last window carry no labels. Uses fewer
        windows, with a warning, where a source has fewer; raises DataError where it has none.
        """
        windows: list[Window] = []
        for index, count in enumerate(apportion(list(self.weights.values()), n_sequences)):
            source = self._sources[index]
            available = self._windows(source, "validation")
            if count and not available:
                raise DataError(
                    f"{self._too_short(source, 'validation')}. Hold out more (prepare --validation-fraction, or "
                    "data.validation_fraction for a Megatron pair), shorten data.seq_len, or set train.eval_every = 0."
                )
            if count > available:
                _log.warning("%s: %d held-out sequences wanted, all %d are used", source.name, count, available)
            windows += [self._window(index, k, "validation") for k in range(min(count, available))]
        batches = []
        for start in range(0, len(windows), self.micro_batch * self.world):
            low = start + self.rank * self.micro_batch
            mine = windows[low : low + self.micro_batch]
            filler = [windows[0]] * (self.micro_batch - len(mine))
            batch = pack([*mine, *filler], self.document_attention)
            batches.append(without_labels(batch, slice(len(mine), None)) if filler else batch)
        return batches

    def shard_files(self) -> list[ShardFile]:
        """What the records of the prepared sources say of their files."""
        return [file for source in self._sources for file in source.files]

    def fingerprint(self) -> dict[str, Any]:
        """What determines the order, for a checkpoint: equal ``sha256`` = the same samples at every number.

        File locations are not part of it, so data may be moved.
        """
        content: dict[str, Any] = {
            "split": "train",
            "seq_len": self.seq_len,
            "seed": self.seed,
            "document_attention": self.document_attention,
            "validation_fraction": None if all(s.vocab_size for s in self._sources) else self._validation_fraction,
            "mixture": self._mixture.counts,
            "content": [source.content_hash for source in self._sources],
        }
        return {**content, "sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}

    def _sample(self, number: int) -> Window:
        source, ordinal = self._mixture.place(number)
        return self._window(source, self._orders[source].window(ordinal), "train")

    def _window(self, index: int, k: int, split: Split) -> Window:
        """Window k of a source's split. Raises DataError for ids that the model does not have."""
        stream = self._sources[index].streams[split]
        start, stop = k * self.seq_len, (k + 1) * self.seq_len + 1
        tokens = stream.tokens(start, stop)
        vocab = self._vocab[index]
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or (vocab is not None and high >= vocab):
            raise DataError(
                f"{stream.file_at(start)}: token ids {low}..{high} in tokens {start}..{stop} of its {split} split; the "
                f"vocabulary has {vocab}. The file is damaged or was made with another tokenizer."
            )
        return Window(tokens, stream.document_starts(start + 1, stop) - start)

    def _windows(self, source: Source, split: Split) -> int:
        return max(0, source.streams[split].num_tokens - 1) // self.seq_len

    def _too_short(self, source: Source, split: Split) -> str:
        return (
            f"data.sources: {source.name}: its {split} split has {source.streams[split].num_tokens} tokens, fewer than "
            f"one sequence of data.seq_len + 1 = {self.seq_len + 1}"
        )

    def _fill(
        self,
        first_step: int,
        last_step: int,
        offset: int,
        ready: "queue.Queue[list[Batch] | BaseException]",
        stop: threading.Event,
    ) -> None:
        try:
            for n in range(first_step, last_step):
                batches = self.step(n, offset)
                if stop.is_set():
                    return
                ready.put(batches)
                if stop.is_set():
                    return
        except BaseException as error:  # handed to the consumer, whatever it is
            ready.put(error)


def _check_fit(source: Source, vocab_size: int | None) -> None:
    """Refuse data with more token ids than the model has."""
    if vocab_size and source.vocab_size and source.vocab_size > vocab_size:
        raise DataError(
            f"data.sources: {source.name}: made with a tokenizer of {source.vocab_size} tokens, but the model has "
            f"{vocab_size}. Prepare it with the model's tokenizer."
        )


def _check_all_differ(sources: Sequence[Source]) -> None:
    """Refuse the same tokens under two names: their weights would add up unnoticed, and where `prepare` has split the
    same text with two seeds, each source would train on what the other holds out."""
    for number, source in enumerate(sources):
        for earlier in sources[:number]:
            # The text is read only where it is almost surely the same.
            if source.content_hash == earlier.content_hash or (
                source.size == earlier.size and source.text_hash() == earlier.text_hash()
            ):
                raise DataError(
                    f"data.sources: {source.name}: holds the same tokens as {earlier.name}. Name one of them."
                )


def _check_one_tokenizer(sources: Sequence[Source]) -> None:
    """Refuse a mixture in which the same id means different text."""
    known = [source for source in sources if source.tokenizer_fingerprint]
    for source in known[1:]:
        if source.tokenizer_fingerprint != known[0].tokenizer_fingerprint:
            raise DataError(
                f"data.sources: {source.name}: made with another tokenizer than {known[0].name}. Prepare it with "
                f"--tokenizer {known[0].name}/tokenizer."
            )
