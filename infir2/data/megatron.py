"""The one token format on disk: a Megatron pair, PREFIX.bin (token ids) and PREFIX.idx (where each document lies).

``TokenWriter`` streams documents into a pair; ``TokenFile`` memory-maps one, ours or brought along, and checks it.

    .idx, little-endian, packed:  b"MMIDIDX\\0\\0" | version u64 = 1 | dtype code u8 | sequences n u64 | documents d u64
                                  | lengths int32[n] (tokens) | pointers int64[n] (bytes) | document indices int64[d]

The document indices count sequences: document i is made of sequences [index[i], index[i+1]). The pair holds d - 1
documents.
"""

import hashlib
import os
import struct
from array import array
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from infir2.durable import naming, replace_file
from infir2.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
UINT16_VOCAB = 65500
"""Vocabularies below this size are stored as uint16, the others as int32 (Megatron's own rule)."""
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
_CODES = {name: code for code, name in _DTYPES.items()}


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype in use that holds every id of a vocabulary."""
    return np.dtype("<u2") if vocab_size < UINT16_VOCAB else np.dtype("<i4")


def with_ending(prefix: str | Path, ending: str) -> Path:
    """``prefix + ending``; a prefix may itself contain dots, so ``with_suffix`` would be wrong."""
    return Path(f"{prefix}{ending}")


@dataclass(frozen=True)
class WrittenPair:
    """What a finished pair holds."""

    tokens: int
    documents: int
    bin_bytes: int
    bin_sha256: str
    idx_bytes: int
    idx_sha256: str


class TokenWriter:
    """Writes one pair, document by document, under temporary names; ``finish`` syncs and renames.

    As a context manager it finishes on success and leaves nothing behind on an error. The .idx is renamed last: a
    pair without it was never finished.
    """

    def __init__(self, prefix: str | Path, vocab_size: int) -> None:
        self.prefix = Path(prefix)
        self.dtype = token_dtype(vocab_size)
        self.tokens = 0
        self._vocab_size = vocab_size
        self._lengths = array("i")
        self._hash = hashlib.sha256()
        self._temporary = with_ending(prefix, ".bin.partial")
        self._file = open(self._temporary, "wb")  # noqa: SIM115 (closed in finish and abort)

    @property
    def documents(self) -> int:
        return len(self._lengths)

    def add_document(self, tokens: NDArray[np.integer]) -> None:
        """Append one document's ids (any integer dtype, 1-D). Raises DataError for an id outside the vocabulary."""
        if len(tokens) and (int(tokens.max()) >= self._vocab_size or int(tokens.min()) < 0):
            raise DataError(
                f"{self.prefix}: document {self.documents} has token ids {int(tokens.min())}..{int(tokens.max())}, "
                f"outside the vocabulary of {self._vocab_size}"
            )
        data = np.ascontiguousarray(tokens, dtype=self.dtype).tobytes()
        with naming(with_ending(self.prefix, ".bin")):
            self._file.write(data)
        self._hash.update(data)
        self._lengths.append(len(tokens))
        self.tokens += len(tokens)

    def finish(self) -> WrittenPair:
        """Write the index, make both files durable and give them their names."""
        n = len(self._lengths)
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if n else np.zeros(0, np.int32)
        pointers = np.zeros(n, np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
        pointers *= self.dtype.itemsize
        header = HEADER.pack(MAGIC, 1, _CODES[self.dtype.name], n, n + 1)
        arrays = (lengths.astype("<i4"), pointers.astype("<i8"), np.arange(n + 1, dtype="<i8"))
        index = header + b"".join(part.tobytes() for part in arrays)
        with naming(with_ending(self.prefix, ".bin")):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, with_ending(self.prefix, ".bin"))
        replace_file(with_ending(self.prefix, ".idx"), index)
        return WrittenPair(
            tokens=self.tokens,
            documents=n,
            bin_bytes=self.tokens * self.dtype.itemsize,
            bin_sha256=self._hash.hexdigest(),
            idx_bytes=len(index),
            idx_sha256=hashlib.sha256(index).hexdigest(),
        )

    def abort(self) -> None:
        """Drop what was written."""
        with suppress(OSError):  # on a full disk what is still to be written cannot be, once more
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.abort()


class TokenFile:
    """A pair opened for reading: memory-mapped ids, index checked against the sizes of both files.

    Raises DataError, naming the file, for anything that does not fit together.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self.bin_path = with_ending(prefix, ".bin")
        self.idx_path = with_ending(prefix, ".idx")
        self.dtype, lengths, pointers, documents = _read_index(self.idx_path)
        _check_pointers(self.idx_path, lengths, pointers, self.dtype.itemsize)
        self.num_tokens = int(lengths.sum(dtype=np.int64))
        self.num_documents = len(documents) - 1
        self.document_offsets: NDArray[np.int64] = np.append(pointers // self.dtype.itemsize, self.num_tokens)[
            documents
        ]
        """int64 [documents + 1]: first token of every document, and ``num_tokens`` at the end."""
        self._map = self._map_tokens()

    def tokens(self, start: int, stop: int) -> NDArray[np.integer]:
        """Ids [start, stop) of the whole file, documents end to end: a view of the map, in the file's dtype."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start}:{stop} of {self.num_tokens} in {self.bin_path}")
        return self._map[start:stop]

    def _map_tokens(self) -> NDArray[np.integer]:
        expected = self.num_tokens * self.dtype.itemsize
        try:
            actual = self.bin_path.stat().st_size
            if actual != expected:
                what = "truncated" if actual < expected else "longer than its index"
                raise DataError(
                    f"{self.bin_path}: {what}: {actual} bytes, but {self.idx_path.name} describes {self.num_tokens} "
                    f"tokens = {expected} bytes. Copy or make it again."
                )
            if not expected:  # an empty file cannot be mapped
                return np.zeros(0, self.dtype)
            return np.memmap(self.bin_path, dtype=self.dtype, mode="r")
        except OSError as error:
            raise DataError(f"{self.bin_path}: cannot be read: {error.strerror or error}") from None


def _read_index(path: Path) -> tuple[np.dtype, NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """dtype, lengths [n], pointers [n] and document indices [d] of an .idx file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not data.startswith(MAGIC):
        raise DataError(f"{path}: not a Megatron index: it does not begin with {MAGIC!r}")
    if len(data) < HEADER.size:
        raise DataError(f"{path}: truncated: {len(data)} bytes, the header alone has {HEADER.size}")
    _, version, code, n, d = HEADER.unpack_from(data)
    if version != 1:
        raise DataError(f"{path}: index version {version}; only version 1 is known")
    name = _DTYPES.get(code, "")
    if "int" not in name:
        raise DataError(f"{path}: dtype code {code} ({name or 'unknown'}) is not an integer type for token ids")
    expected = HEADER.size + 12 * n + 8 * d
    # Multimodal pairs carry one more byte for each sequence, which means nothing to a text model.
    if len(data) not in (expected, expected + n):
        what = "truncated" if len(data) < expected else "too long"
        raise DataError(f"{path}: {what}: {len(data)} bytes, {n} sequences and {d} document marks take {expected}")
    lengths = np.frombuffer(data, "<i4", n, HEADER.size).copy()
    pointers = np.frombuffer(data, "<i8", n, HEADER.size + 4 * n).copy()
    documents = np.frombuffer(data, "<i8", d, HEADER.size + 12 * n).copy()
    if d < 1 or documents[0] != 0 or documents[-1] != n or (np.diff(documents) < 0).any():
        raise DataError(f"{path}: broken document indices: they must rise from 0 to the {n} sequences")
    return np.dtype(name).newbyteorder("<"), lengths, pointers, documents


def _check_pointers(path: Path, lengths: NDArray[np.int32], pointers: NDArray[np.int64], itemsize: int) -> None:
    """Every sequence must begin where the one before it ends: then any token range is one slice of the map."""
    if not len(lengths):
        return
    ends = np.cumsum(lengths, dtype=np.int64) * itemsize
    wrong = np.flatnonzero((lengths < 0) | (pointers != ends - lengths.astype(np.int64) * itemsize))
    if len(wrong):
        i = int(wrong[0])
        raise DataError(
            f"{path}: broken index: sequence {i} has {int(lengths[i])} tokens at byte {int(pointers[i])}, where byte "
            f"{int(ends[i - 1]) if i else 0} is expected"
        )
