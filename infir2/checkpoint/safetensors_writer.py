"""Writes safetensors files tensor by tensor, so that a model of any size needs the memory of one tensor.

The header of a safetensors file comes first and says where every tensor lies. With dtypes and shapes known beforehand
it is written at once, and each tensor then goes to its place in whatever order they come.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from infir2.durable import write_file
from infir2.errors import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TAGS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""torch dtype -> the name that safetensors gives it."""
_LARGEST_WRITE = 1 << 30  # Linux writes at most 2 GiB a call.


class TensorSpec(NamedTuple):
    """What is known of a tensor before it is there."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """One new file with room for the tensors of ``specs``; ``finish`` it when all of them are written.

    Raises CheckpointError for a tensor that is not in the specs, differs from them or is missing at the end.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self.path, self.specs = path, specs
        self._waiting = set(specs)
        # Wide elements first: then every tensor starts at a multiple of its element size, as readers that map need it.
        layout = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        places, end = {}, 0
        for name in layout:
            places[name], end = end, end + specs[name].nbytes
            entry = {"dtype": TAGS[specs[name].dtype], "shape": list(specs[name].shape)}
            header[name] = {**entry, "data_offsets": [places[name], end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._place = {name: 8 + len(text) + place for name, place in places.items()}
        write_file(path, len(text).to_bytes(8, "little") + text)
        os.truncate(path, 8 + len(text) + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor (any device, any strides) in its place."""
        if name not in self._waiting:
            raise CheckpointError(f"{name}: {'given twice' if name in self.specs else 'not expected'}")
        found = TensorSpec(tensor.dtype, tuple(tensor.shape))
        if found != self.specs[name]:
            raise CheckpointError(f"{name}: {found} was given where {self.specs[name]} was announced")
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        data = memoryview(flat.numpy())  # type: ignore[arg-type]
        place = self._place[name]
        handle = os.open(self.path, os.O_WRONLY)
        try:
            while data:
                count = os.pwrite(handle, data[:_LARGEST_WRITE], place)
                data, place = data[count:], place + count
        finally:
            os.close(handle)
        self._waiting.remove(name)

    def finish(self) -> None:
        """Make the file durable."""
        if self._waiting:
            raise CheckpointError(f"{min(self._waiting)}: not given ({len(self._waiting)} in all)")
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())


def write_planned(
    folder: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[tuple[str, Tensor]], limit: int
) -> None:
    """Shards of at most ``limit`` bytes with the tensors of ``specs``, which may come in any order. Keeps none."""
    files = [SafetensorsFile(folder / _part(n), part) for n, part in enumerate(_groups(specs, limit))]
    file_of = {name: file for file in files for name in file.specs}
    for name, tensor in tensors:
        if name not in file_of:
            raise CheckpointError(f"{name}: not expected")
        file_of[name].write(name, tensor)
    for file in files:
        file.finish()
    _name_files(folder, files)


def _groups(specs: Mapping[str, TensorSpec], limit: int) -> Iterator[dict[str, TensorSpec]]:
    """The specs in their order, cut where ``limit`` would be exceeded; a larger tensor gets a group of its own."""
    group: dict[str, TensorSpec] = {}
    held = 0
    for name, spec in specs.items():
        if group and held + spec.nbytes > limit:
            yield group
            group, held = {}, 0
        group[name] = spec
        held += spec.nbytes
    yield group


def _name_files(folder: Path, files: list[SafetensorsFile]) -> None:
    """Final names, which need the number of shards, and the index if there are several."""
    if len(files) == 1:
        os.rename(files[0].path, folder / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for number, file in enumerate(files):
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        os.rename(file.path, folder / name)
        weight_map.update(dict.fromkeys(file.specs, name))
    total = sum(spec.nbytes for file in files for spec in file.specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_file(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())


def _part(number: int) -> str:
    return f"part-{number:05d}.safetensors"
