"""A matrix product whose contraction was cut into parts: the sums are there, and whoever reads them adds them.

The work is a line of steps, one for each 128 terms of the contraction of each tile of columns, tile after tile, and
programs take equal pieces of that line. So one tile's contraction is shared by neighbours, each of which leaves the
sums of its own terms, and these are always added in the order of the line. How many programs there are depends on the
weights alone: what a token's product is does not depend on how many other tokens there are.

Where all tiles have equally many parts that is split-K, else Stream-K (Osama et al., 2023).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """How the programs share the work of one product."""

    tiles: int
    """Tiles of columns."""
    blocks: int
    """Steps of a tile."""
    programs: int

    @property
    def steps(self) -> int:
        return self.tiles * self.blocks

    @property
    def even(self) -> bool:
        """Whether every tile is shared by the same number of programs that have no other."""
        return self.programs % self.tiles == 0

    def owner(self, step: int) -> int:
        """The program that takes a step: program p takes those from p * steps // programs on."""
        return ((step + 1) * self.programs - 1) // self.steps

    def parts(self, tile: int) -> int:
        """How many programs share a tile."""
        return self.owner((tile + 1) * self.blocks - 1) - self.owner(tile * self.blocks) + 1

    @cached_property
    def most(self) -> int:
        """PartialSums of the tile that has most."""
        return max(map(self.parts, range(self.tiles)))


@dataclass(frozen=True)
class PartialSums:
    """Sums that make up a matrix [rows, outputs] when they are added and rounded."""

    sums: Tensor
    """float32 [most parts, rows, outputs]; of a tile that has fewer parts, the rest is not initialised."""
    split: Split

    def total(self, dtype: torch.dtype) -> Tensor:
        """The matrix [rows, outputs] in ``dtype``, its parts added in their order in float32."""
        width = self.sums.shape[2] // self.split.tiles
        counts = torch.tensor([self.split.parts(tile) for tile in range(self.split.tiles)], device=self.sums.device)
        total = self.sums[0]
        for part in range(1, self.split.most):
            total = torch.where((part < counts).repeat_interleave(width), total + self.sums[part], total)
        return total.to(dtype)
