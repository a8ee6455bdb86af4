"""Records that cross a boundary between floors."""

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that is not trained on."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of packed token sequences."""

    input_ids: Tensor
    """int64 [batch, length]."""
    labels: Tensor
    """int64 [batch, length]: the token that follows each input, or IGNORE. Already shifted."""
    position_ids: Tensor
    """int64 [batch, length]: position inside the token's own document."""
    cu_seqlens: Tensor
    """int32 [documents + 1]: document boundaries in the flattened batch, 0 first and batch * length last."""
    max_seqlen: int
    """Length of the longest document in the batch."""

    @property
    def valid_tokens(self) -> int:
        """Positions that count in the loss."""
        return int((self.labels != IGNORE).sum())

    @property
    def attended(self) -> int:
        """Pairs (token, token it attends to) in causal attention inside the documents: the sum of n(n + 1)/2."""
        lengths = self.cu_seqlens.diff().long()
        return int((lengths * (lengths + 1) // 2).sum())

    def to(self, device: torch.device | str) -> Self:
        """The same batch, of the same class, with every tensor on the device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors: dict[str, Any] = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})
