"""Operand: a quantised matrix, that is its codes, its scales and how many elements share a scale."""

from dataclasses import dataclass

import torch
from torch import Tensor

from infir2.kernels import matmul, reference
from infir2.kernels import quantize as quantizer
from infir2.kernels.operand import transpose_operand


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

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """code * scale, [rows, contraction]."""
        return reference.dequantize(self.codes, self.scale, self.granularity, dtype)

    def matmul(self, other: "Operand", out_dtype: torch.dtype) -> Tensor:
        """self @ other.T: [M, K] and [N, K] -> [M, N], float32 sums."""
        return matmul.scaled_mm(
            self.codes, self.scale, self.granularity, other.codes, other.scale, other.granularity, out_dtype
        )
