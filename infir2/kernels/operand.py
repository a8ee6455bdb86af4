"""How the codes and scales of an operand lie in memory, on every device.

Codes are contiguous rows. Scales lie as cuBLAS wants to read them: ``tile`` scales [rows, n] column by column,
``block`` scales in rows padded to a multiple of four, all others in contiguous rows.
"""

import torch
from torch import Tensor

from infir2.kernels import reference
from infir2.kernels.reference import FP8

AMAX_PARTS = 8
"""Rows of the amax of row codes: so many programs at a time raise a column's maximum without waiting for each other."""


def empty_operand(rows: int, cols: int, granularity: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Uninitialised codes and scales of a [rows, cols] operand. ValueError for an unknown granularity."""
    codes = torch.empty(rows, cols, dtype=FP8, device=device)
    return codes, _empty_scale(reference.scale_shape(granularity, rows, cols), granularity, device)


def empty_rows(rows: int, cols: int, amax: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised codes, scales and amax of row codes (see ``row_codes``). Without ``amax`` that has no columns."""
    largest = torch.empty(AMAX_PARTS, cols if amax else 0, dtype=torch.float32, device=device)
    return *empty_operand(rows, cols, "tile", device), largest


def zeroed_rows(rows: int, cols: int, amax: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The same with an amax of zeros, for kernels to raise."""
    codes, scale, largest = empty_rows(rows, cols, amax, device)
    return codes, scale, largest.zero_() if amax else largest


def contiguous_rows(x: Tensor) -> Tensor:
    """``x`` with adjacent elements in a row, as kernels read a matrix; a copy only where they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_scale(shape: tuple[int, int], granularity: str, device: torch.device) -> Tensor:
    rows, cols = shape
    if granularity == "tile":
        return torch.empty(cols, rows, dtype=torch.float32, device=device).T
    if granularity == "block":
        return torch.zeros(rows, cols + -cols % 4, dtype=torch.float32, device=device)[:, :cols]
    return torch.empty(rows, cols, dtype=torch.float32, device=device)


def with_layout(scale: Tensor, granularity: str) -> Tensor:
    """A copy of float32 scales [rows, cols] that lies as those of this granularity do."""
    out = _empty_scale((scale.shape[0], scale.shape[1]), granularity, scale.device)
    return out.copy_(scale)
