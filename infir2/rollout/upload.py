"""Numbers of the host, to the device without waiting for it."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def pinned(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor from which a copy to the device need not be waited for."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor on the device with the array's dtype; on a CPU it shares the array's memory."""
    return pinned(array, device).to(device, non_blocking=True)


def block_tables(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """int32 [rows, longest row], rows filled up with 0."""
    tables = np.zeros((len(rows), max(map(len, rows))), dtype=np.int32)
    for table, row in zip(tables, rows):
        table[: len(row)] = row
    return tables
