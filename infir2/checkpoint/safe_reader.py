"""Reads DCP's ``.metadata`` without running any of it.

torch.distributed.checkpoint stores its index as a pickle and loads it with ``pickle.load``, which runs whatever the
file says. Here the names that a real index uses become inert records, every other name is refused, and the index is
then rebuilt from the records field by field: sizes must be sizes, file names must be files of the verified manifest.
"""

import io
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from infir2.errors import CheckpointError

METADATA = ".metadata"
_DATA_FILE = re.compile(r"__\d+_\d+\.distcp")
_DCP = "torch.distributed.checkpoint"
_NAMES = {
    *((f"{_DCP}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((f"{_DCP}.metadata", name) for name in ("TensorStorageMetadata", "BytesStorageMetadata")),
    *((f"{_DCP}.metadata", name) for name in ("ChunkStorageMetadata", "_MEM_FORMAT_ENCODING")),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
    ("pathlib._local", "PosixPath"),  # Python 3.13's own name for it
}


class _Record:
    """An object of the pickle that does nothing: its class name, its constructor arguments and its state."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any) -> "_Record":
        record = object.__new__(cls)
        record.args = args
        return record

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._classes: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(found := vars(torch).get(name), torch.dtype):
            return found
        if (module, name) not in _NAMES:
            raise CheckpointError(f"refused: it asks for {module}.{name}, which no checkpoint index needs")
        # A class made for this file only: a pickle can set attributes on the classes it names.
        return self._classes.setdefault(name, type(name, (_Record,), {}))


class VerifiedReader(FileSystemReader):
    """DCP's reader over an index that ``read_metadata`` has already checked."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._verified = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._verified


def read_metadata(folder: Path, sizes: Mapping[str, int]) -> Metadata:
    """DCP's index of the tensors in ``folder``; ``sizes`` = bytes of each file of the verified manifest.

    Raises CheckpointError for a pickle that asks for anything but index records, for entries that are not tensors, and
    for entries that point outside the manifest's files.
    """
    path = folder / METADATA
    try:
        if METADATA not in sizes:
            raise CheckpointError("not listed in the manifest")
        return _rebuild(_Unpickler(path.read_bytes()).load(), sizes)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # A hostile or damaged pickle can raise anything at all.
        raise CheckpointError(f"{path}: not a checkpoint index ({type(error).__name__}: {error})") from error


def _rebuild(root: Any, sizes: Mapping[str, int]) -> Metadata:
    fields = _fields(root, "Metadata")
    tensors: dict[str, TensorStorageMetadata] = {
        str(name): _tensor(name, record) for name, record in fields["state_dict_metadata"].items()
    }
    storage = {}
    for key, record in fields["storage_data"].items():
        index = _fields(key, "MetadataIndex")
        place = MetadataIndex(str(index["fqn"]), _size(index["offset"]), index.get("index"))
        storage[place] = _storage_info(place.fqn, record, sizes)
    for name, tensor in tensors.items():
        for chunk in tensor.chunks:
            if MetadataIndex(name, chunk.offsets) not in storage:
                raise CheckpointError(f"{name}: no data stored for the part at {list(chunk.offsets)}")
        if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != math.prod(tensor.size):
            raise CheckpointError(f"{name}: its parts do not cover {list(tensor.size)}")
    return Metadata(dict(tensors), planner_data=None, storage_data=storage, storage_meta=StorageMeta())


def _tensor(name: str, record: Any) -> TensorStorageMetadata:
    if _kind(record) == "BytesStorageMetadata":
        raise CheckpointError(f"refused: {name} is a pickled object; checkpoints hold tensors only")
    fields = _fields(record, "TensorStorageMetadata")
    dtype = _kind_checked(fields["properties"], "TensorProperties").state[0]
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{name}: its dtype is not a dtype")
    size = _size(fields["size"])
    chunks = []
    for item in fields["chunks"]:
        chunk = _fields(item, "ChunkStorageMetadata")
        offsets, sizes = _size(chunk["offsets"]), _size(chunk["sizes"])
        inside = all(start + length <= full for start, length, full in zip(offsets, sizes, size, strict=True))
        if not inside:
            raise CheckpointError(f"{name}: a part of it lies outside its shape {list(size)}")
        chunks.append(ChunkStorageMetadata(offsets, sizes))
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _storage_info(name: str, record: Any, sizes: Mapping[str, int]) -> _StorageInfo:
    fields = _fields(record, "_StorageInfo")
    file, offset, length = fields["relative_path"], fields["offset"], fields["length"]
    if not isinstance(file, str) or not _DATA_FILE.fullmatch(file) or file not in sizes:
        raise CheckpointError(f"refused: {name} points to {file!r}, which is not a data file of this checkpoint")
    if not (isinstance(offset, int) and isinstance(length, int) and 0 <= offset <= offset + length <= sizes[file]):
        raise CheckpointError(f"{name}: bytes {offset}..+{length} lie outside {file}")
    if fields.get("transform_descriptors"):
        raise CheckpointError(f"refused: {name} asks for a stream transform")
    return _StorageInfo(file, offset, length)


def _kind(record: Any) -> str:
    return type(record).__name__ if isinstance(record, _Record) else ""


def _kind_checked(record: Any, kind: str) -> _Record:
    if _kind(record) != kind:
        raise CheckpointError(f"expected a {kind}, found {_kind(record) or type(record).__name__}")
    return record


def _fields(record: Any, kind: str) -> dict[str, Any]:
    return dict(_kind_checked(record, kind).state)


def _size(record: Any) -> torch.Size:
    numbers = list(_kind_checked(record, "Size").args[0])
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise CheckpointError(f"{numbers[:8]} is not a shape")
    return torch.Size(numbers)
