"""Records that cross a boundary between floors."""

from dataclasses import dataclass

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

    def to(self, device: torch.device | str) -> "Batch":
        def move(t: Tensor) -> Tensor:
            return t.to(device, non_blocking=True)

        return Batch(
            move(self.input_ids), move(self.labels), move(self.position_ids), move(self.cu_seqlens), self.max_seqlen
        )
