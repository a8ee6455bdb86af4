"""Records that cross a boundary between floors."""

from dataclasses import dataclass, field, fields, replace
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
    filling: int = field(default=0, kw_only=True)
    """Tokens at the end that only fill the batch up, a document of their own; nobody wants to know what they cost."""

    @property
    def read_tokens(self) -> int:
        """Tokens of the documents, trained on or not."""
        return self.labels.numel() - self.filling

    @property
    def valid_tokens(self) -> int:
        """Positions that count in the loss."""
        return int((self.labels != IGNORE).sum())

    @property
    def attended(self) -> int:
        """Pairs (token, token it attends to) in causal attention inside the documents: the sum of n(n + 1)/2."""
        lengths = self.cu_seqlens.diff().long()
        return int((lengths * (lengths + 1) // 2).sum()) - self.filling * (self.filling + 1) // 2

    def beginning(self, tokens: int) -> Self:
        """The first ``tokens`` tokens of the first row, or as many whole rows as they suffice for."""
        rows, length = self.labels.shape
        kept, cut = max(1, min(rows, tokens // length)), min(tokens, length)
        end = torch.tensor([kept * cut], dtype=self.cu_seqlens.dtype, device=self.cu_seqlens.device)
        boundaries = torch.cat([self.cu_seqlens[self.cu_seqlens < end], end])
        shorter: dict[str, Any] = {
            name: value[:kept, :cut] for name, value in self.tensors().items() if value.shape == self.labels.shape
        }
        longest, filling = int(boundaries.diff().max()), max(0, self.filling - (length - cut))
        return replace(self, **shorter, cu_seqlens=boundaries, max_seqlen=longest, filling=filling)

    def to(self, device: torch.device | str) -> Self:
        """The same batch, of the same class, with every tensor on the device."""
        moved: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in self.tensors().items()}
        return replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, by their names."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}
