"""A prepared folder: token shards for each split beside ``dataset.json``, which says what they hold and hashes them.

OUT/dataset.json  OUT/tokenizer/  OUT/train-00000.bin  OUT/train-00000.idx  ...  OUT/validation-00000.bin  ...
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import pydantic
from numpy.typing import NDArray

from infir2.data.megatron import TokenFile, TokenWriter, token_dtype, with_ending
from infir2.durable import replace_file
from infir2.errors import DataError

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
RECORD = "dataset.json"
FORMAT_VERSION = 1


class _Record(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)


class Shard(_Record):
    """One Megatron pair of a split."""

    name: str = pydantic.Field(pattern=r"^[A-Za-z0-9_-]+$")
    """File name without its ending; never a path, so nothing outside the folder is opened."""
    tokens: int
    documents: int
    bin_bytes: int
    bin_sha256: str
    idx_bytes: int
    idx_sha256: str


@dataclass(frozen=True)
class ShardFile:
    """One file of a prepared folder, as ``dataset.json`` says it was written."""

    path: Path
    size: int
    """Bytes."""
    sha256: str

    def check_size(self) -> None:
        """Raises DataError where the file is missing, truncated or too long."""
        try:
            actual = self.path.stat().st_size
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        if actual != self.size:
            what = "truncated" if actual < self.size else "too long"
            raise DataError(
                f"{self.path}: {what}: {actual} bytes, {RECORD} says {self.size}. Copy or prepare it again."
            )

    def check_hash(self, progress: Callable[[int], object] | None = None) -> None:
        """Raises DataError where a byte differs; ``progress`` hears the bytes of each piece that was read."""
        try:
            actual = hash_file(self.path, progress)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        if actual != self.sha256:
            raise DataError(f"{self.path}: damaged: its sha256 differs from {RECORD}'s. Copy or prepare it again.")


class SourceCount(_Record):
    """What one input gave."""

    path: str
    files: int
    documents: int
    text_bytes: int


class BadRows(_Record):
    """Rows left out."""

    rows: int
    """All rows read, good and bad."""
    counts: dict[str, int]
    """By reason."""
    examples: dict[str, list[str]]
    """The first few of each reason as file:line."""


class DatasetRecord(_Record):
    """``dataset.json``."""

    format_version: int
    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    eos_id: int
    dtype: str
    seed: int
    validation_fraction: float
    splits: dict[Split, list[Shard]]
    sources: list[SourceCount]
    bad_rows: BadRows


class ShardWriter:
    """Streams documents into the shards of both splits; a shard that has reached ``shard_tokens`` is closed."""

    def __init__(self, folder: Path, vocab_size: int, shard_tokens: int) -> None:
        self._folder = folder
        self._vocab_size = vocab_size
        self._shard_tokens = shard_tokens
        self._open: dict[Split, TokenWriter] = {}
        self._done: dict[Split, list[Shard]] = {split: [] for split in SPLITS}

    def add(self, split: Split, tokens: NDArray[np.integer]) -> None:
        """Append one document (1-D ids, its end-of-document token included)."""
        writer = self._open.get(split)
        if writer is None:
            name = f"{split}-{len(self._done[split]):05d}"
            writer = self._open[split] = TokenWriter(self._folder / name, self._vocab_size)
        writer.add_document(tokens)
        if writer.tokens >= self._shard_tokens:
            self._close(split)

    def finish(self) -> dict[Split, list[Shard]]:
        """Close the last shards; returns all of them."""
        for split in list(self._open):
            self._close(split)
        return self._done

    def _close(self, split: Split) -> None:
        writer = self._open.pop(split)
        self._done[split].append(Shard(name=writer.prefix.name, **vars(writer.finish())))

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._open.values():
            writer.abort()


def write_record(folder: Path, record: DatasetRecord) -> None:
    """Write ``dataset.json`` with its own hash inside, durably."""
    content = record.model_dump(mode="json")
    text = json.dumps({**content, "sha256": _hash_of(content)}, indent=1) + "\n"
    replace_file(folder / RECORD, text.encode())


def read_record(folder: Path) -> DatasetRecord:
    """Read ``dataset.json``. Raises DataError, naming it, when it is missing, truncated or changed."""
    path = folder / RECORD
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise DataError(f"{path}: not a data set record")
        if content.get("format_version") != FORMAT_VERSION:
            raise DataError(
                f"{path}: format_version {content.get('format_version')!r}; this release reads {FORMAT_VERSION}. "
                "Prepare the data again."
            )
        if content.pop("sha256", None) != _hash_of(content):
            raise DataError(f"{path}: damaged: its content does not match its own sha256. Copy or prepare it again.")
        return DatasetRecord.model_validate(content)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # json, unicode and pydantic errors are all ValueErrors
        raise DataError(f"{path}: damaged: {str(error).splitlines()[0]}. Copy or prepare it again.") from None


def names_in(folder: Path) -> list[str]:
    """What lies in a folder, sorted. Raises DataError where it cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from None


class Dataset:
    """A prepared folder, opened: every file's size is checked now, every hash with ``verify=True``."""

    def __init__(
        self, folder: str | Path, verify: bool = False, progress: Callable[[int], object] | None = None
    ) -> None:
        self.folder = Path(folder)
        self.record = read_record(self.folder)
        for file in self.shard_files():
            file.check_size()
            if verify:
                file.check_hash(progress)

    def shard_files(self) -> list[ShardFile]:
        """The .bin and .idx of every shard."""
        found = []
        for shard in (shard for split in SPLITS for shard in self.record.splits.get(split, [])):
            prefix = self.folder / shard.name
            found.append(ShardFile(with_ending(prefix, ".bin"), shard.bin_bytes, shard.bin_sha256))
            found.append(ShardFile(with_ending(prefix, ".idx"), shard.idx_bytes, shard.idx_sha256))
        return found

    def num_tokens(self, split: Split) -> int:
        return sum(shard.tokens for shard in self.record.splits.get(split, []))

    def num_documents(self, split: Split) -> int:
        return sum(shard.documents for shard in self.record.splits.get(split, []))

    def files(self, split: Split) -> list[TokenFile]:
        """The split's shards in order."""
        return [file for shard, file in self._files if shard.name.rpartition("-")[0] == split]

    @cached_property
    def _files(self) -> list[tuple[Shard, TokenFile]]:
        opened = []
        for split in SPLITS:
            for shard in self.record.splits.get(split, []):
                file = TokenFile(self.folder / shard.name)
                expected = (shard.tokens, shard.documents, token_dtype(self.record.vocab_size))
                if (file.num_tokens, file.num_documents, file.dtype) != expected:
                    raise DataError(f"{file.idx_path}: does not describe the shard that {RECORD} lists")
                opened.append((shard, file))
        return opened


def hash_file(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a file, read in pieces; ``progress`` hears the bytes of each."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
            if progress:
                progress(len(piece))
    return digest.hexdigest()


def _hash_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
