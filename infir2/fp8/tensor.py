"""Operand: a quantised matrix, that is its codes, its scales and how many elements share a scale."""

from dataclasses import dataclass

import torch
from torch import Tensor

from infir2.kernels import matmul, reference
from infir2.kernels import quantize as quantizer
from infir2.kernels.row_codes import quantize_rows
from infir2.kernels.transpose import transpose_operand, transpose_rows


@dataclass(frozen=True)
class Operand:
    """[rows, contraction] as float8_e4m3fn codes and float32 scales; see ``infir2.kernels.reference``."""

    codes: Tensor
    scale: Tensor
    granularity: str

    @staticmethod
    def quantize(x: Tensor, granularity: str, scale_format: str, transpose: bool = False) -> "Operand":
        """The operand of ``x`` [rows, cols], or of x.T."""
        codes, scale = quantizer.quantize(x, granularity, scale_format, transpose)
        return Operand(codes, scale, granularity)

    @staticmethod
    def quantize_both(
        x: Tensor, granularity: str, transposed_granularity: str, scale_format: str
    ) -> tuple["Operand", "Operand"]:
        """The operands of ``x`` and of x.T, in one pass over ``x`` where the kernel can."""
        codes, scale, codes_t, scale_t = quantizer.quantize_both(x, granularity, transposed_granularity, scale_format)
        return Operand(codes, scale, granularity), Operand(codes_t, scale_t, transposed_granularity)

    @property
    def T(self) -> "Operand":
        """The operand of x.T, exactly; raises ValueError where the granularity does not transpose."""
        codes, scale = transpose_operand(self.codes, self.scale, self.granularity)
        return Operand(codes, scale, self.granularity)

    def moved_into(self, other: "Operand | None") -> "Operand":
        """The same numbers in the memory of ``other``, an older operand of this shape, so that whoever has recorded its
        addresses (a CUDA graph) sees them; this operand where there is none."""
        if other is None or other.codes.device != self.codes.device:
            return self
        other.codes.copy_(self.codes)
        other.scale.copy_(self.scale)
        return other

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """code * scale, [rows, contraction]."""
        return reference.dequantize(self.codes, self.scale, self.granularity, dtype)

    def matmul(self, other: "Operand", out_dtype: torch.dtype) -> Tensor:
        """self @ other.T: [M, K] and [N, K] -> [M, N], float32 sums."""
        return matmul.scaled_mm(
            self.codes, self.scale, self.granularity, other.codes, other.scale, other.granularity, out_dtype
        )


Saved = tuple[Tensor, Tensor, Tensor]
"""What is kept of a matrix until its transpose is needed: its codes, scales and amax, or the transpose's own."""


def quantize_twice_used(
    x: Tensor, granularity: str, transposed: str, scale_format: str, derive: bool
) -> tuple[Operand, Saved]:
    """The operand of ``x`` [rows, cols], and what ``transposed_operand`` needs to make that of x.T.

    derive: x.T's codes come from the codes of ``x`` (see ``infir2.kernels.row_codes``); else both are made from ``x``
    now.
    """
    if derive:
        saved = quantize_rows(x, transposed == "channel")
        return Operand(saved[0], saved[1], granularity), saved
    operand, operand_t = Operand.quantize_both(x, granularity, transposed, scale_format)
    return operand, (operand_t.codes, operand_t.scale, x.new_empty(0))


def transposed_operand(saved: Saved, transposed: str, derive: bool) -> Operand:
    """The operand of x.T."""
    codes, scale, amax = saved
    if derive:
        codes, scale = transpose_rows(codes, scale, amax, transposed)
    return Operand(codes, scale, transposed)
