"""Whole pieces of a decoder layer in FP8: norm and projections, and the MLP, quantised where their inputs are made.

``fuse`` puts them into a model that ``infir2.fp8.convert`` has converted. Parameters and names stay where they are; the
forward pass writes FP8 codes instead of the normalised input and of silu(gate) * up, and multiplies q/k/v and gate/up
each in one GEMM. The numerics are those of the single layers, the same codes in the same GEMMs, but for SwiGLU: here it
and its gradient go from float32 to codes without a rounding to the compute dtype between.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from infir2.fp8.group import LinearGroup
from infir2.fp8.linear import Fp8Linear, weight_gradient
from infir2.fp8.recipe import Recipe
from infir2.fp8.tensor import Operand
from infir2.kernels.matmul import pad_tokens, scaled_mm
from infir2.kernels.norm import norm_quantize, rms_norm, rms_norm_backward
from infir2.kernels.reference import BLOCK
from infir2.kernels.rotary_qkv import heads_fit, rotate_qkv, rotate_qkv_backward, rotate_qkv_backward_quantize
from infir2.kernels.row_codes import quantize_rows
from infir2.kernels.swiglu import swiglu, swiglu_backward, swiglu_backward_quantize, swiglu_quantize
from infir2.kernels.transpose import transpose_operand

MlpActivations = Literal["fp8", "bf16", "recompute"]
"""How gate and up wait for the backward pass: as FP8 codes, as they are, or not at all (their GEMM is run again)."""

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


def fuse(model: nn.Module, keep: MlpActivations = "fp8") -> list[str]:
    """Put the fused pieces into every attention and MLP of ``model`` that they fit; returns the names of those.

    A piece fits where all its linears are FP8 with a recipe of row codes, and the MLP has no bias.
    """
    done = []
    for name, module in model.named_modules():
        if hasattr(module, "fused_projections") and (linears := _row_coded(module, _PROJECTIONS)):
            module.fused_projections = FusedProjections(linears)
            if module.q_norm is None and _turnable(module.head_dim, linears):
                module.fused_heads = FusedHeads(module.fused_projections.group, module.head_dim)
            done.append(name)
        elif hasattr(module, "fused_mlp") and (linears := _row_coded(module, _MLP, biased=False)):
            gate, up, down = linears
            module.fused_mlp = FusedMlp(gate, up, down, keep)
            done.append(name)
    return done


def _row_coded(module: nn.Module, names: tuple[str, ...], biased: bool = True) -> list[Fp8Linear]:
    """The linears of those names if all are FP8 with row codes and, unless ``biased``, without bias; else none."""
    linears = [getattr(module, name) for name in names]
    fit = (isinstance(x, Fp8Linear) and x.recipe.row_codes and (biased or x.bias is None) for x in linears)
    return linears if all(fit) else []


def _turnable(head_dim: int, linears: list[Fp8Linear]) -> bool:
    biased = {linear.bias is not None for linear in linears}
    return len(biased) == 1 and heads_fit(head_dim, [linear.out_features for linear in linears])


class FusedProjections:
    """RMSNorm and the linears that read its output, in one GEMM."""

    def __init__(self, linears: list[Fp8Linear]) -> None:
        self.group = LinearGroup(linears)

    def __call__(self, hidden: Tensor, norm_weight: Tensor, eps: float) -> tuple[tuple[Tensor, ...], Tensor]:
        """hidden [..., features] -> one tensor [..., out_features] a linear, biases added, and hidden, as ``fork``."""
        group, operand = self.group, self.group.operand()
        group.measure_weights()
        measured = group if any(linear.health is not None for linear in group.linears) else None
        y, stream = _Projections.apply(
            hidden.flatten(0, -2), norm_weight, eps, operand.codes, operand.scale, group.recipe,
            torch.is_grad_enabled(), measured, *group.weights,
        )  # fmt: skip
        return group.outputs(y.unflatten(0, hidden.shape[:-1])), stream.view(hidden.shape)


class FusedHeads:
    """The same, with biases and rotary positions, up to the queries, keys and values of every head."""

    def __init__(self, group: LinearGroup, head_dim: int) -> None:
        self.group, self.kv_heads = group, group.sizes[1] // head_dim

    def __call__(
        self, hidden: Tensor, norm_weight: Tensor, eps: float, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hidden [batch, length, features], cos and sin [batch, length, head_dim / 2] -> q, k and v [batch, length,
        heads, head_dim], and hidden, as ``fork``."""
        group, operand = self.group, self.group.operand()
        group.measure_weights()
        measured = group if any(linear.health is not None for linear in group.linears) else None
        biases = [linear.bias for linear in group.linears if linear.bias is not None]
        *heads, stream = _Heads.apply(
            hidden.flatten(0, -2), norm_weight, eps, operand.codes, operand.scale, group.recipe,
            torch.is_grad_enabled(), measured, cos.flatten(0, -2), sin.flatten(0, -2), self.kv_heads,
            *group.weights, *biases,
        )  # fmt: skip
        q, k, v = (part.unflatten(0, hidden.shape[:-1]) for part in heads)
        return q, k, v, stream.view(hidden.shape)


class FusedMlp:
    """RMSNorm, gate and up in one GEMM, SwiGLU and down, and the residual additions before and after them."""

    def __init__(self, gate: Fp8Linear, up: Fp8Linear, down: Fp8Linear, keep: MlpActivations) -> None:
        self.group, self.down, self.keep = LinearGroup([gate, up]), LinearGroup([down]), keep

    def __call__(self, hidden: Tensor, update: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
        """x + mlp(x) of x = hidden + update, all [..., features]."""
        gate_up, down = self.group.operand(), self.down.operand()
        self.group.measure_weights()
        self.down.measure_weights()
        measured = self if any(linear.health is not None for linear in self.group.linears) else None
        y = _Mlp.apply(
            hidden.flatten(0, -2), update.flatten(0, -2), norm_weight, eps,
            gate_up.codes, gate_up.scale, down.codes, down.scale,
            self.group.recipe, self.keep, torch.is_grad_enabled(), measured, *self.group.weights, *self.down.weights,
        )  # fmt: skip
        return y.unflatten(0, hidden.shape[:-1])


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_weight: Tensor, eps: float, w_codes: Tensor, w_scale: Tensor, recipe: Recipe,
        training: bool, measured: LinearGroup | None, *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        y, kept = _project(ctx, x, norm_weight, eps, w_codes, w_scale, recipe, training, measured, weights)
        ctx.save_for_backward(*kept)
        return y, x

    @staticmethod
    def backward(ctx: Any, grad: Tensor, residual: Tensor) -> tuple[Any, ...]:
        g = pad_tokens(grad)
        g_saved = quantize_rows(g, ctx.recipe.channel_wgrad)
        if ctx.measured is not None:
            _measure_gradient(ctx.measured, g, g_saved[0], g_saved[1], ctx.sizes)
        dx, d_norm, dw = _project_backward(ctx, g_saved, residual, ctx.saved_tensors, any(ctx.needs_input_grad[8:]))
        return dx, d_norm, *[None] * 6, *dw


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_weight: Tensor, eps: float, w_codes: Tensor, w_scale: Tensor, recipe: Recipe,
        training: bool, measured: LinearGroup | None, cos: Tensor, sin: Tensor, kv_heads: int,
        *weights_and_biases: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        weights, biases = weights_and_biases[:3], weights_and_biases[3:]
        y, kept = _project(ctx, x, norm_weight, eps, w_codes, w_scale, recipe, training, measured, weights)
        ctx.save_for_backward(*kept, cos, sin)
        ctx.biased = len(biases) > 0
        bias = torch.cat(biases).to(y.dtype) if biases else None
        return *rotate_qkv(y, bias, cos, sin, kv_heads), x

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, residual: Tensor) -> tuple[Any, ...]:
        *kept, cos, sin = ctx.saved_tensors
        rows = kept[2].shape[0]  # of the codes: whole tiles on a GPU
        *g_saved, sums = rotate_qkv_backward_quantize(dq, dk, dv, cos, sin, rows, ctx.recipe.channel_wgrad, ctx.biased)
        if ctx.measured is not None:
            g = pad_tokens(rotate_qkv_backward(dq, dk, dv, cos, sin))
            _measure_gradient(ctx.measured, g, g_saved[0], g_saved[1], ctx.sizes)
        dx, d_norm, dw = _project_backward(ctx, g_saved, residual, kept, any(ctx.needs_input_grad[11:14]))
        db = sums.sum(0).to(ctx.dtype).split(ctx.sizes) if ctx.biased else ()
        return dx, d_norm, *[None] * 9, *dw, *db


def _project(
    ctx: Any, x: Tensor, norm_weight: Tensor, eps: float, w_codes: Tensor, w_scale: Tensor, recipe: Recipe,
    training: bool, measured: LinearGroup | None, weights: tuple[Tensor, ...],
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """norm(x) W^T, and what its backward pass needs."""
    padded = pad_tokens(x)
    codes, scale, amax, _ = norm_quantize(padded, norm_weight, eps, training and recipe.channel_wgrad)
    if measured is not None:
        _measure_input(measured, rms_norm(padded, norm_weight, eps), codes, scale)
    ctx.recipe, ctx.measured, ctx.eps = recipe, measured, eps
    ctx.sizes, ctx.dtype = [weight.shape[0] for weight in weights], weights[0].dtype
    y = scaled_mm(codes, scale, "tile", w_codes, w_scale, "block", x.dtype)[: x.shape[0]]
    return y, [x, norm_weight, codes, scale, amax, w_codes, w_scale]


def _project_backward(
    ctx: Any, g_saved: Any, residual: Tensor, kept: Any, wanted: bool
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """From row codes of the gradient of y and what ``_project`` kept: gradients of x, norm and weights."""
    x, norm_weight, *x_saved, w_codes, w_scale = kept
    normed = _input_gradient(g_saved[0], g_saved[1], w_codes, w_scale, residual.dtype)
    dx, d_norm = rms_norm_backward(normed[: x.shape[0]], x, residual, norm_weight, ctx.eps)
    return dx, d_norm, _split_gradient(g_saved, x_saved, ctx.recipe, ctx.dtype, ctx.sizes, wanted)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, update: Tensor, norm_weight: Tensor, eps: float,
        w_codes: Tensor, w_scale: Tensor, down_codes: Tensor, down_scale: Tensor,
        recipe: Recipe, keep: MlpActivations, training: bool, measured: FusedMlp | None, *weights: Tensor,
    ) -> Tensor:  # fmt: skip
        rows, amax = hidden.shape[0], training and recipe.channel_wgrad
        *x_saved, x = norm_quantize(pad_tokens(hidden), norm_weight, eps, amax, pad_tokens(update))
        gate_up = scaled_mm(x_saved[0], x_saved[1], "tile", w_codes, w_scale, "block", x.dtype)
        a_codes, a_scale, kept, kept_scale = swiglu_quantize(gate_up, training and keep == "fp8")
        if measured is not None:
            _measure_input(measured.group, rms_norm(x, norm_weight, eps), x_saved[0], x_saved[1])
            _measure_input(measured.down, swiglu(gate_up), a_codes, a_scale)
        if keep != "fp8":
            kept = gate_up if keep == "bf16" else kept
        ctx.save_for_backward(x, norm_weight, *x_saved, w_codes, w_scale, down_codes, down_scale, kept, kept_scale)
        ctx.recipe, ctx.keep, ctx.measured, ctx.eps = recipe, keep, measured, eps
        ctx.sizes, ctx.dtype = [weight.shape[0] for weight in weights], weights[0].dtype
        return x[:rows] + scaled_mm(a_codes, a_scale, "tile", down_codes, down_scale, "block", x.dtype)[:rows]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, norm_weight, *x_saved, w_codes, w_scale, down_codes, down_scale, gate_up, kept_scale = ctx.saved_tensors
        rows, channel = grad.shape[0], ctx.recipe.channel_wgrad
        if ctx.keep == "recompute":
            gate_up = scaled_mm(x_saved[0], x_saved[1], "tile", w_codes, w_scale, "block", grad.dtype)
        g = pad_tokens(grad)
        g_saved = quantize_rows(g, channel)
        d_value = _input_gradient(g_saved[0], g_saved[1], down_codes, down_scale, grad.dtype)
        *d_saved, a_codes, a_scale, a_amax = swiglu_backward_quantize(d_value, gate_up, kept_scale, channel)
        if ctx.measured is not None:
            wide = Operand(gate_up, kept_scale, "tile").dequantize() if ctx.keep == "fp8" else gate_up
            d_gate_up = swiglu_backward(d_value, wide)
            _measure_gradient(ctx.measured.group, d_gate_up, d_saved[0], d_saved[1], ctx.sizes[:2])
            _measure_gradient(ctx.measured.down, g, g_saved[0], g_saved[1], ctx.sizes[2:])
        wanted = any(ctx.needs_input_grad[12:])
        d_down = _split_gradient(g_saved, (a_codes, a_scale, a_amax), ctx.recipe, ctx.dtype, ctx.sizes[2:], wanted)
        normed = _input_gradient(d_saved[0], d_saved[1], w_codes, w_scale, grad.dtype)
        dx, d_norm = rms_norm_backward(normed[:rows], x[:rows], grad, norm_weight, ctx.eps)
        dw = _split_gradient(d_saved, x_saved, ctx.recipe, ctx.dtype, ctx.sizes[:2], wanted)
        return dx, dx, d_norm, *[None] * 9, *dw, *d_down


def _input_gradient(codes: Tensor, scale: Tensor, w_codes: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """g W from row codes of g and the weight's own codes, transposed."""
    return scaled_mm(codes, scale, "tile", *transpose_operand(w_codes, w_scale, "block"), "block", dtype)


def _split_gradient(
    grad: Any, x: Any, recipe: Recipe, dtype: torch.dtype, sizes: list[int], wanted: bool
) -> tuple[Tensor | None, ...]:
    """g^T x, cut into the weights that it belongs to."""
    if not wanted:
        return (None,) * len(sizes)
    return weight_gradient(tuple(grad), tuple(x), recipe, dtype).split(sizes)


def _measure_input(group: LinearGroup, values: Tensor, codes: Tensor, scale: Tensor) -> None:
    operand = Operand(codes, scale, "tile")
    group.measure("x", [values] * len(group.linears), [operand] * len(group.linears))


def _measure_gradient(group: LinearGroup, values: Tensor, codes: Tensor, scale: Tensor, sizes: list[int]) -> None:
    blocks = [size // BLOCK for size in sizes]
    parts = zip(codes.split(sizes, dim=1), scale.split(blocks, dim=1), strict=True)
    group.measure("g", values.split(sizes, dim=1), [Operand(code, part, "tile") for code, part in parts])
