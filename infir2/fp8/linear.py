"""Fp8Linear: a linear layer whose three GEMMs run in FP8.

The float32 master weight is rounded to bfloat16 and then quantised, once an optimiser step: every micro-batch, the
exporter and the rollout engine use those codes. Rounding first makes the codes the same whether they come from the
master weights, from a bfloat16 checkpoint or from a bfloat16 all-gather.

What is kept for the backward pass is FP8: codes of x, and the weight's, which a 128x128 block or a tensor scale allows
to be transposed exactly when they are needed.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from infir2.fp8.recipe import Recipe
from infir2.fp8.tensor import Operand, Saved, quantize_twice_used, transposed_operand
from infir2.kernels.matmul import pad_tokens
from infir2.kernels.row_codes import quantize_rows


class Fp8Linear(nn.Linear):
    """Drop-in for nn.Linear: same parameters and names, FP8 arithmetic by ``recipe``.

    x [..., in_features] in bfloat16 or float32 -> [..., out_features] in the same dtype. The bias is added outside FP8.
    Call ``infir2.fp8.convert.refresh_weights(model)`` whenever weights have changed.
    """

    recipe: Recipe

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: Recipe) -> "Fp8Linear":
        """Take over the parameters of ``linear`` (the very same tensors)."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.train(linear.training)
        layer.recipe = recipe
        return layer

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.stale = True
        self.health: Any = None
        """Set by infir2.fp8.health while it measures: called with (operand name, high-precision values, Operand)."""
        self.group: Any = None
        """The infir2.fp8.group.LinearGroup that this layer is part of: its codes are then rows of the group's."""
        self._operand: Operand | None = None
        self._operand_t: Operand | None = None

    def refresh_if_whole(self) -> None:
        """Quantise a stale weight, unless it is a shard or has no data yet."""
        if self.stale and not isinstance(self.weight, DTensor) and not self.weight.is_meta:
            self._requantize()

    def weight_operand(self) -> Operand:
        """The weight's FP8 codes and scales, as every GEMM of this optimiser step uses them."""
        if self.stale:
            self._requantize()
        assert self._operand is not None
        return self._operand

    def bfloat16_weight(self) -> Tensor:
        """What is quantised."""
        return self.weight.detach().to(torch.bfloat16)

    @torch.no_grad()
    def _requantize(self) -> None:
        if self.group is not None:
            self.group.requantize()
            return
        weight, recipe = self.bfloat16_weight(), self.recipe
        operand = Operand.quantize(weight, recipe.weight, recipe.scale_format)
        self._operand = operand.moved_into(self._operand)
        if not recipe.weight_transposes:
            self._operand_t = Operand.quantize(weight, recipe.weight, recipe.scale_format, transpose=True)
        self.stale = False

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_operand()
        flat = x.reshape(-1, self.in_features)
        if self.health is not None:
            self.health("w", self.weight, weight)
        if torch.is_grad_enabled() and (self.weight.requires_grad or flat.requires_grad):
            y = _Fp8Matmul.apply(flat, self.weight, weight, self._operand_t, self.recipe, self.health)
        else:
            y = _quantized(pad_tokens(flat), self.recipe).matmul(weight, flat.dtype)[: flat.shape[0]]
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe.name}, scale_format={self.recipe.scale_format}"


class _Fp8Matmul(torch.autograd.Function):
    """y = x W^T with FP8 operands in all three GEMMs; x [tokens, in], W [out, in]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        operand: Operand,
        operand_t: Operand | None,
        recipe: Recipe,
        health: Any,
    ) -> Tensor:
        rows, padded = x.shape[0], pad_tokens(x)
        x_fprop, saved = quantize_twice_used(
            padded, recipe.x, recipe.x_wgrad, recipe.scale_format, derive=recipe.row_codes
        )
        if health is not None:
            health("x", padded, x_fprop)
        backward_weight = operand if operand_t is None else operand_t
        ctx.save_for_backward(*saved, backward_weight.codes, backward_weight.scale)
        ctx.recipe, ctx.health, ctx.rows, ctx.transposed = recipe, health, rows, operand_t is not None
        ctx.weight_dtype = weight.dtype
        return x_fprop.matmul(operand, x.dtype)[:rows]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        recipe = ctx.recipe
        *x_saved, w_codes, w_scale = ctx.saved_tensors
        padded = pad_tokens(grad)
        g_dgrad, g_saved = quantize_twice_used(
            padded, recipe.grad, recipe.grad_wgrad, recipe.scale_format, derive=recipe.row_codes
        )
        if ctx.health is not None:
            ctx.health("g", padded, g_dgrad)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            weight = Operand(w_codes, w_scale, recipe.weight)
            dx = g_dgrad.matmul(weight if ctx.transposed else weight.T, grad.dtype)[: ctx.rows]
        if ctx.needs_input_grad[1]:
            dw = weight_gradient(g_saved, tuple(x_saved), recipe, ctx.weight_dtype)
        return dx, dw, None, None, None, None


def weight_gradient(grad: Saved, x: Saved, recipe: Recipe, dtype: torch.dtype) -> Tensor:
    """g^T x [out, in] from what ``quantize_twice_used`` saved of g and x."""
    left = transposed_operand(grad, recipe.grad_wgrad, derive=recipe.row_codes)
    return left.matmul(transposed_operand(x, recipe.x_wgrad, derive=recipe.row_codes), dtype)


def _quantized(x: Tensor, recipe: Recipe) -> Operand:
    """x as the forward GEMM reads it, where nothing has to be kept."""
    if recipe.row_codes:
        codes, scale, _ = quantize_rows(x, False)
        return Operand(codes, scale, recipe.x)
    return Operand.quantize(x, recipe.x, recipe.scale_format)
