"""LinearGroup: FP8 layers that read the same input, multiplied by one GEMM while each keeps its parameters and name.

Their codes lie one below the other in one operand; each layer's own operand is its rows of it, so whoever asks a layer
for its codes gets those that the GEMM uses.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from infir2.fp8.linear import Fp8Linear
from infir2.fp8.tensor import Operand
from infir2.kernels.dispatch import inference_on_cuda
from infir2.kernels.reference import BLOCK


class LinearGroup:
    """Layers of one recipe with 128x128 weight blocks, equal in_features, out_features in multiples of 128."""

    def __init__(self, linears: Sequence[Fp8Linear]) -> None:
        self.linears = tuple(linears)
        self.recipe = linears[0].recipe
        self.sizes = [linear.out_features for linear in linears]
        self._operand: Operand | None = None
        self._bias: Tensor | None = None
        for linear in linears:
            linear.group = self

    def operand(self) -> Operand:
        """Codes and scales of all layers' weights, as every GEMM of this optimiser step uses them."""
        if any(linear.stale for linear in self.linears):
            self.requantize()
        assert self._operand is not None
        return self._operand

    @torch.no_grad()
    def requantize(self) -> None:
        weight = torch.cat([linear.bfloat16_weight() for linear in self.linears])
        operand = Operand.quantize(weight, self.recipe.weight, self.recipe.scale_format)
        self._operand = operand.moved_into(self._operand)
        start = 0
        for linear, size in zip(self.linears, self.sizes, strict=True):
            rows, blocks = slice(start, start + size), slice(start // BLOCK, (start + size) // BLOCK)
            linear._operand = Operand(self._operand.codes[rows], self._operand.scale[blocks], self.recipe.weight)
            linear.stale = False
            start += size
        if self._bias is not None:  # in its place, as the codes are: a CUDA graph may have recorded it
            self._bias.copy_(torch.cat([linear.bias for linear in self.linears]))

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return tuple(linear.weight for linear in self.linears)

    def outputs(self, y: Tensor) -> tuple[Tensor, ...]:
        """The GEMM's result [..., all out_features], cut into each layer's output, with biases where there are any."""
        if inference_on_cuda(y) and all(linear.bias is not None for linear in self.linears):
            return (y + self.joined_bias(y)).split(self.sizes, dim=-1)
        pairs = zip(y.split(self.sizes, dim=-1), self.linears, strict=True)
        return tuple(part if linear.bias is None else part + linear.bias.to(y.dtype) for part, linear in pairs)

    def joined_bias(self, like: Tensor) -> Tensor:
        """All biases end to end, in the dtype and on the device of ``like``."""
        if self._bias is None or self._bias.dtype != like.dtype or self._bias.device != like.device:
            self._bias = torch.cat([linear.bias.detach() for linear in self.linears]).to(like)
        return self._bias

    def measure_weights(self) -> None:
        """Report every layer's weight, where health is measured."""
        for linear in self.linears:
            if linear.health is not None:
                linear.health("w", linear.weight, linear.weight_operand())

    def measure(self, operand: str, values: Sequence[Tensor], codes: Sequence[Operand]) -> None:
        """Report one operand of every layer, where health is measured."""
        for linear, value, code in zip(self.linears, values, codes, strict=True):
            if linear.health is not None:
                linear.health(operand, value, code)
