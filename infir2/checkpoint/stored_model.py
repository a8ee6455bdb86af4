"""The weights of a training checkpoint, one tensor at a time: a view for whoever needs no more than one of them."""

import math
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from infir2.checkpoint import manifest, safe_reader
from infir2.checkpoint.cause import reason
from infir2.checkpoint.safetensors_writer import TAGS
from infir2.errors import CheckpointError

_PREFIX = "model."


class StoredModel:
    """The model in a checkpoint folder that ``CheckpointStore.find`` has verified, of any number of ranks.

    Names are parameter names, dtypes are named as safetensors does. The optimiser's state is left alone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        sizes = {name: entry.size for name, entry in manifest.read(folder).items()}
        self._index = safe_reader.read_metadata(folder, sizes)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for key, entry in self._index.state_dict_metadata.items():
            if key.startswith(_PREFIX):
                name = key.removeprefix(_PREFIX)
                self.shapes[name] = tuple(entry.size)  # type: ignore[union-attr]
                self.dtypes[name] = TAGS.get(self._dtype(name), str(self._dtype(name)))
        elements = {name: math.prod(shape) for name, shape in self.shapes.items()}
        self.nbytes = sum(count * self._dtype(name).itemsize for name, count in elements.items())

    def tensor(self, name: str) -> Tensor:
        """One whole tensor in host memory, in the dtype it is stored in."""
        value = torch.empty(self.shapes[name], dtype=self._dtype(name))
        try:
            reader = safe_reader.VerifiedReader(self.folder, self._index)
            dcp.load({_PREFIX + name: value}, storage_reader=reader, no_dist=True)
        except (Exception, dcp.CheckpointException) as error:  # DCP's exception is a BaseException.
            raise CheckpointError(f"{self.folder}: {name} cannot be read: {reason(error)}") from error
        return value

    def _dtype(self, name: str) -> torch.dtype:
        return self._index.state_dict_metadata[_PREFIX + name].properties.dtype  # type: ignore[union-attr]
