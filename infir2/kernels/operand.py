"""How the codes and scales of an operand lie in memory, on every device.

Codes are contiguous rows. ``tile`` scales [rows, n] are stored column by column, as cuBLAS wants to read them; all
other scales are contiguous rows.
"""

import torch
from torch import Tensor

from infir2.kernels import reference
from infir2.kernels.reference import FP8


def empty_operand(rows: int, cols: int, granularity: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Uninitialised codes and scales of a [rows, cols] operand."""
    codes = torch.empty(rows, cols, dtype=FP8, device=device)
    return codes, _empty_scale(reference.scale_shape(granularity, rows, cols), granularity, device)


def transpose_operand(codes: Tensor, scale: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    """The operand of x.T from the operand of x, exactly. Only ``block`` and ``tensor`` scales allow it."""
    if granularity not in ("block", "tensor"):
        raise ValueError(f"{granularity} scales do not transpose: quantise the transposed matrix instead")
    return codes.T.contiguous(), with_layout(scale.T, granularity)


def _empty_scale(shape: tuple[int, int], granularity: str, device: torch.device) -> Tensor:
    rows, cols = shape
    if granularity == "tile":
        return torch.empty(cols, rows, dtype=torch.float32, device=device).T
    return torch.empty(rows, cols, dtype=torch.float32, device=device)


def with_layout(scale: Tensor, granularity: str) -> Tensor:
    out = _empty_scale((scale.shape[0], scale.shape[1]), granularity, scale.device)
    return out.copy_(scale)
