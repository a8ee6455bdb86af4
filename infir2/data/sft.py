"""Fine-tuning data: tokenised rows, the order f(seed, step) in which they come, and their packing into micro-batches.

Epoch e visits all rows in a permutation drawn from (seed, e); each optimiser step takes the next global_batch of them,
and the last step of an epoch what is left. The rows of a step are packed into micro-batches of at most max_tokens, and
these are dealt to the ranks. Nothing of this has a state: any step can be made from its number.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infir2.data.chat import ChatTokenizer, Rendered, Sample
from infir2.data.conversations import Row
from infir2.data.documents import BadRow, RowLedger
from infir2.data.order import shuffled_rows
from infir2.data.packing import MULTIPLE, best_fit_decreasing, pack_documents
from infir2.durable import naming
from infir2.errors import DataError
from infir2.types import Batch

_BATCH_ROWS, _BATCH_CHARACTERS = 2048, 8 << 20


@dataclass(frozen=True)
class TokenRows:
    """Tokenised rows end to end; the arrays may be memory maps."""

    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    """Like tokens: which of them are trained on."""
    offsets: NDArray[np.int64]
    """[rows + 1]: row i is tokens[offsets[i] : offsets[i + 1]]."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        here = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.tokens[here], self.trained[here]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def select(self, rows: Sequence[int] | NDArray[np.int64]) -> "TokenRows":
        """Some of the rows, copied."""
        return TokenRows.join([Sample(*self.row(int(index))) for index in rows])

    @staticmethod
    def join(samples: Sequence[Sample]) -> "TokenRows":
        sizes = [len(sample.ids) for sample in samples]
        return TokenRows(
            np.concatenate([np.zeros(0, np.int32), *(sample.ids for sample in samples)]),
            np.concatenate([np.zeros(0, np.bool_), *(sample.trained for sample in samples)]),
            np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)]),
        )

    def is_whole(self) -> bool:
        """Whether the arrays fit each other."""
        end = int(self.offsets[-1]) if len(self.offsets) else -1
        return self.tokens.shape == self.trained.shape == (end,)

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for array in (self.offsets, self.tokens, self.trained):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def save(self, folder: Path, name: str) -> None:
        for key in ("tokens", "trained", "offsets"):
            _save_array(folder / f"{name}-{key}.npy", getattr(self, key))

    @staticmethod
    def open(folder: Path, name: str) -> "TokenRows":
        """Memory-mapped rows. Raises OSError or ValueError for files that are missing or damaged."""
        arrays = [
            np.load(folder / f"{name}-{key}.npy", mmap_mode="r", allow_pickle=False)
            for key in ("tokens", "trained", "offsets")
        ]
        return TokenRows(*arrays)


def _save_array(path: Path, array: NDArray) -> None:
    """As numpy.save does, which has no word for a full disk but how many elements it has written."""
    array = np.ascontiguousarray(array)
    with naming(path), open(path, "xb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)


@dataclass
class RowCounts:
    """What became of the rows of a source."""

    rows: int = 0
    """Rows read."""
    samples: int = 0
    """Training samples made of them: one a row, more where the chat template rewrites earlier turns."""
    dropped: int = 0
    """Samples left out because they are longer than max_length (or have nothing to learn within it)."""
    empty: int = 0
    """Samples left out because nothing in them is trained on."""
    truncated: int = 0
    """Samples cut at max_length."""
    bad: dict[str, int] = field(default_factory=dict)
    """Rows left out, by reason."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first few of each reason as file:line."""
    tokens: int = 0
    trained_tokens: int = 0

    def summary(self) -> str:
        parts = [f"{self.rows:,} rows", f"{self.samples:,} samples", f"{self.tokens:,} tokens"]
        parts.append(f"{self.trained_tokens / max(self.tokens, 1):.1%} of them trained on")
        parts += [f"{self.truncated:,} truncated"] * bool(self.truncated)
        parts += [f"{self.dropped:,} dropped as too long"] * bool(self.dropped)
        parts += [f"{self.empty:,} left out with nothing to train on"] * bool(self.empty)
        parts += [f"{count:,} bad: {why} ({', '.join(self.examples[why][:2])})" for why, count in self.bad.items()]
        return ", ".join(parts)


def tokenize_rows(
    rows: Iterable[Row],
    chat: ChatTokenizer,
    max_length: int,
    too_long: str,
    ledger: RowLedger,
    progress: Callable[[float], object] = lambda share: None,
) -> tuple[TokenRows, NDArray[np.int64], RowCounts]:
    """Render, tokenise and mask every row; ``progress`` is told the share that is done.

    Returns the samples, the number of the row that each was made of, and what became of the rows. Raises DataError when
    there are more bad rows than the ledger allows.
    """
    counts = RowCounts()
    kept: list[Sample] = []
    origins: list[int] = []
    for batch in _rendered(rows, chat, ledger, progress):
        for (row, _), sample in zip(batch, chat.encode([text for _, text in batch])):
            counts.samples += 1
            if len(sample.ids) > max_length:
                cut = Sample(sample.ids[:max_length], sample.trained[:max_length])
                if too_long == "drop" or not cut.trained[1:].any():
                    counts.dropped += 1
                    continue
                counts.truncated += 1
                sample = cut
            if not sample.trained[1:].any():  # the first token is never a label; there may be no token at all
                counts.empty += 1
                continue
            kept.append(sample)
            origins.append(row)
    ledger.check_share()
    counts.rows, counts.bad, counts.examples = ledger.rows, dict(Counter(ledger.counts)), ledger.examples
    made = TokenRows.join(kept)
    counts.tokens, counts.trained_tokens = len(made.tokens), int(made.trained.sum())
    return made, np.array(origins, np.int64), counts


def _rendered(
    rows: Iterable[Row], chat: ChatTokenizer, ledger: RowLedger, progress: Callable[[float], object]
) -> Iterator[list[tuple[int, Rendered]]]:
    """(number of the row, training text) of all good rows, in batches for the tokenizer."""
    batch: list[tuple[int, Rendered]] = []
    size = 0
    for row in rows:
        ledger.rows += 1
        try:
            texts = chat.render(row.parse())
        except BadRow as error:
            ledger.count_bad(row.path, row.line, error)
            continue
        batch += [(ledger.rows - 1, text) for text in texts]
        size += sum(len(text.text) for text in texts)
        if len(batch) >= _BATCH_ROWS or size >= _BATCH_CHARACTERS:
            yield batch
            progress(row.passed)
            batch, size = [], 0
    if batch:
        yield batch


class SftLoader:
    """Batches of rows for one rank. Raises DataError where there is no row.

    A micro-batch is filled up to a multiple of 128 tokens, or with ``whole`` to ``max_tokens`` (rounded up to that).
    """

    def __init__(
        self,
        rows: TokenRows,
        seed: int,
        global_batch: int,
        epochs: int,
        max_tokens: int,
        rank: int = 0,
        world: int = 1,
        whole: bool = False,
    ) -> None:
        if not len(rows):
            raise DataError("data.train: no row is left to train on")
        self.rows, self.seed, self.global_batch, self.epochs = rows, seed, global_batch, epochs
        self.max_tokens, self.rank, self.world, self.whole = max_tokens, rank, world, whole
        self.multiple = -(-max_tokens // MULTIPLE) * MULTIPLE if whole else MULTIPLE
        self.steps_per_epoch = -(-len(rows) // global_batch)
        self.steps = epochs * self.steps_per_epoch
        self._places = rows.lengths - 1  # a row's last token is only a label
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, np.int64))

    def rows_of(self, step: int) -> NDArray[np.int64]:
        """Numbers of the rows that optimiser step ``step`` (from 1) trains on, over all ranks."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, shuffled_rows(len(self.rows), self.seed, epoch))
        return self._order[1][place * self.global_batch : (place + 1) * self.global_batch]

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step; every rank has the same number."""
        return self._batches(self.rows_of(step))

    def stream(self, first: int, last: int) -> Iterator[list[Batch]]:
        """``step(n)`` for n from ``first`` to ``last``, both included."""
        for step in range(first, last + 1):
            yield self.step(step)

    def values(self, step: int) -> dict[str, float]:
        """Numbers about a step: its place in the epochs, tokens read over all ranks, and how full the batches are."""
        read, padded = self._filling(self.rows_of(step))
        return {"epoch": step / self.steps_per_epoch, "processed_tokens": read, "packing_efficiency": read / padded}

    def efficiency(self) -> float:
        """Tokens of rows / tokens of micro-batches, over the first 200 steps."""
        filled = [self._filling(self.rows_of(step)) for step in range(1, min(self.steps, 200) + 1)]
        return sum(read for read, _ in filled) / sum(padded for _, padded in filled)

    def held_out(self, rows: TokenRows, most_rows: int) -> list[Batch]:
        """This rank's batches of the first ``most_rows`` rows of another set; every rank has the same number."""
        other = SftLoader(rows, self.seed, self.global_batch, 1, self.max_tokens, self.rank, self.world, self.whole)
        return other._batches(np.arange(min(most_rows, len(rows))))

    def fingerprint(self, content_sha256: str) -> dict[str, Any]:
        """What determines the rows of every step: equal ``sha256`` = the same rows in the same order."""
        content = {"kind": "sft", "seed": self.seed, "rows": len(self.rows), "content": content_sha256}
        return {**content, "sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}

    def _batches(self, rows: NDArray[np.int64]) -> list[Batch]:
        dealt = deal([int(self._places[row]) for row in rows], self.max_tokens, self.world)
        mine = dealt[self.rank :: self.world]
        return [pack_documents([self.rows.row(int(rows[i])) for i in documents], self.multiple) for documents in mine]

    def _filling(self, rows: NDArray[np.int64]) -> tuple[int, int]:
        """(tokens of the rows, tokens of their micro-batches over all ranks)."""
        places = [int(self._places[row]) for row in rows]
        totals = [sum(places[i] for i in documents) for documents in deal(places, self.max_tokens, self.world)]
        return sum(places), sum(max(1, -(-total // self.multiple)) * self.multiple for total in totals)


def deal(lengths: Sequence[int], max_tokens: int, world: int) -> list[list[int]]:
    """Micro-batches of documents (indices into ``lengths``), a multiple of ``world`` of them, the fullest first.

    Rank r takes numbers r, r + world, ...: what the ranks do at the same time is of about the same size. Best-fit
    packing makes as few micro-batches as it can; where they do not divide among the ranks, the fullest are split in
    two rather than adding empty ones, which remain for steps with fewer documents than ranks.
    """

    def tokens(documents: list[int]) -> int:
        return sum(lengths[i] for i in documents)

    bins = best_fit_decreasing(lengths, max_tokens)
    while len(bins) % world:
        fullest = max((b for b in bins if len(b) > 1), key=tokens, default=None)
        if fullest is None:
            bins.append([])
            continue
        bins.remove(fullest)
        halves: list[list[int]] = [[], []]
        for i in sorted(fullest, key=lambda i: (-lengths[i], i)):
            min(halves, key=tokens).append(i)
        bins += halves
    return sorted(bins, key=lambda documents: (-tokens(documents), documents))
