"""What a recipe names under data.sources: a prepared folder or the prefix of a Megatron pair, as two token streams."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from infir2.data.dataset import RECORD, Dataset, ShardFile, Split, names_in
from infir2.data.megatron import TokenFile, with_ending
from infir2.errors import DataError


class Segment(NamedTuple):
    """Tokens [start, stop) of one file, cut at document boundaries."""

    file: TokenFile
    start: int
    stop: int


class TokenStream:
    """Segments end to end, addressed by one running token number."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = [segment for segment in segments if segment.stop > segment.start]
        sizes = [segment.stop - segment.start for segment in self._segments]
        self._offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
        self.num_tokens = int(self._offsets[-1])
        self._documents = [
            np.searchsorted(file.document_offsets, (start, stop)).tolist() for file, start, stop in self._segments
        ]
        self.num_documents = sum(stop - start for start, stop in self._documents)

    def tokens(self, start: int, stop: int) -> NDArray[np.int64]:
        """Ids [start, stop) as int64."""
        parts = [file.tokens(first, last) for file, first, last, _ in self._pieces(start, stop)]
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Token numbers in [start, stop) at which a document begins, rising; empty documents leave no trace."""
        found = [np.zeros(0, np.int64)]
        for file, first, last, shift in self._pieces(start, stop):
            low, high = np.searchsorted(file.document_offsets, (first, last))
            found.append(file.document_offsets[low:high] + shift)
        return np.unique(np.concatenate(found))

    def documents(self) -> Iterator[NDArray[np.integer]]:
        """The ids of every document."""
        for (file, _, _), (first, last) in zip(self._segments, self._documents):
            for start, stop in pairwise(file.document_offsets[first : last + 1].tolist()):
                yield file.tokens(start, stop)

    def file_at(self, token: int) -> Path:
        """The .bin file that holds a token, for error messages."""
        return self._segments[int(np.searchsorted(self._offsets, token, side="right")) - 1].file.bin_path

    def _pieces(self, start: int, stop: int) -> list[tuple[TokenFile, int, int, int]]:
        """(file, first, last, shift) for every file that [start, stop) touches; token number = file's token + shift."""
        pieces = []
        i = int(np.searchsorted(self._offsets, start, side="right")) - 1
        while start < stop:
            file, begin, _ = self._segments[i]
            shift = int(self._offsets[i]) - begin
            end = min(stop, int(self._offsets[i + 1]))
            pieces.append((file, start - shift, end - shift, shift))
            start, i = end, i + 1
        return pieces


@dataclass(frozen=True)
class Source:
    """One opened source."""

    name: str
    streams: dict[Split, TokenStream]
    vocab_size: int | None
    """Ids are below this; None for a Megatron pair, which does not say."""
    tokenizer_fingerprint: str | None
    content_hash: str
    """Changes when the tokens change."""
    files: tuple[ShardFile, ...] = ()
    """What the source's own record says of its files; nothing for a Megatron pair."""

    @property
    def size(self) -> tuple[int, int]:
        """Documents and tokens of all splits."""
        streams = self.streams.values()
        return sum(stream.num_documents for stream in streams), sum(stream.num_tokens for stream in streams)

    def text_hash(self) -> int:
        """Equal for the same documents, whatever their order and splits. Reads all of them."""
        documents = (document for stream in self.streams.values() for document in stream.documents())
        digests = (hashlib.blake2b(ids.astype(np.int64).tobytes(), digest_size=16).digest() for ids in documents)
        return sum(int.from_bytes(digest, "little") for digest in digests)


def open_source(name: str, validation_fraction: float) -> Source:
    """Open a prepared folder, or a Megatron pair whose last documents become the validation split.

    Raises DataError when there is neither, or when a file is missing, truncated or inconsistent.
    """
    path = Path(name)
    if path.suffix in (".bin", ".idx"):
        path = path.with_name(path.name[:-4])
    if os.path.isdir(path):
        return _open_prepared(name, path)
    if any(os.path.exists(with_ending(path, ending)) for ending in (".idx", ".bin")):
        return _open_pair(name, path, validation_fraction)
    raise DataError(
        f"data.sources: {name}: there is neither a folder made by `infir2 prepare` nor a Megatron pair "
        f"({path.name}.bin and {path.name}.idx). Make one: infir2 prepare TEXT --out {name}"
    )


def _open_prepared(name: str, folder: Path) -> Source:
    if RECORD not in names_in(folder):
        raise DataError(f"{folder}: no {RECORD}: not a prepared data set. Make one: infir2 prepare TEXT --out {folder}")
    dataset = Dataset(folder)
    record = dataset.record
    digest = hashlib.sha256()
    streams = {}
    for split, shards in record.splits.items():
        streams[split] = TokenStream([Segment(file, 0, file.num_tokens) for file in dataset.files(split)])
        digest.update("\n".join([split, *(f"{shard.bin_sha256} {shard.idx_sha256}" for shard in shards), ""]).encode())
    fingerprint, files = record.tokenizer_fingerprint, tuple(dataset.shard_files())
    return Source(name, streams, record.vocab_size, fingerprint, digest.hexdigest(), files)


def _open_pair(name: str, prefix: Path, validation_fraction: float) -> Source:
    file = TokenFile(prefix)
    held_out = -int(-file.num_documents * validation_fraction // 1)  # rounded up
    cut = int(file.document_offsets[file.num_documents - held_out])
    streams: dict[Split, TokenStream] = {
        "train": TokenStream([Segment(file, 0, cut)]),
        "validation": TokenStream([Segment(file, cut, file.num_tokens)]),
    }
    return Source(name, streams, None, None, _pair_hash(file))


def _pair_hash(file: TokenFile) -> str:
    """Hash of the index and of 64 pages spread over the ids: hashing all of a brought corpus would take too long."""
    digest = hashlib.sha256(file.idx_path.read_bytes())
    for start in np.linspace(0, max(0, file.num_tokens - 1024), 64).astype(np.int64):
        digest.update(file.tokens(int(start), min(int(start) + 1024, file.num_tokens)).tobytes())
    return digest.hexdigest()
