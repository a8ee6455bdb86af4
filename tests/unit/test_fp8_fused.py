"""The fused pieces of a decoder layer: the same codes, outputs and gradients as its single layers."""

import dataclasses
from typing import Any

import pytest
import torch
from tensors import relative_error
from torch import Tensor

from infir2.fp8 import group as group_module
from infir2.fp8 import health as health_module
from infir2.fp8.convert import convert, refresh_weights
from infir2.fp8.fused import MlpActivations
from infir2.fp8.health import measure
from infir2.fp8.linear import Fp8Linear
from infir2.fp8.recipe import recipe_named
from infir2.kernels import reference
from infir2.kernels.norm import fork, norm_quantize, rms_norm
from infir2.kernels.row_codes import quantize_rows
from infir2.kernels.swiglu import swiglu, swiglu_backward, swiglu_backward_quantize, swiglu_quantize
from infir2.kernels.transpose import transpose_rows
from infir2.model.attention import causal_attention
from infir2.model.config import ModelConfig
from infir2.model.presets import preset
from infir2.model.transformer import CausalLM

TOKENS = 48


def build(recipe: str, fused: bool, keep: MlpActivations = "bf16", dtype: torch.dtype = torch.float32) -> CausalLM:
    model = CausalLM(architecture(), dtype)
    model.init_weights(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.1)
    report = convert(model, recipe_named(recipe), mlp_activations=keep)
    assert report.fused == [f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn", "mlp")]
    if not fused:
        for layer in model.model.layers:
            layer.self_attn.fused_projections = layer.self_attn.fused_heads = layer.mlp.fused_mlp = None
            for module in layer.modules():
                if isinstance(module, Fp8Linear):
                    module.group = None
    refresh_weights(model)
    return model


def architecture() -> ModelConfig:
    return dataclasses.replace(preset("tiny", 256), num_hidden_layers=2)


def run(model: CausalLM) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.randint(0, 256, (2, TOKENS // 2), generator=torch.Generator().manual_seed(1))
    logits = model(ids, torch.arange(TOKENS // 2).expand(2, -1), causal_attention)
    logits.logsumexp(-1).sum().backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("recipe", ["blockwise", "hybrid"])
def test_fused_equals_single_layers(recipe: str) -> None:
    logits, gradients = run(build(recipe, fused=True))
    plain_logits, plain_gradients = run(build(recipe, fused=False))
    assert relative_error(logits, plain_logits) < 1e-6
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in gradients.items():
        assert relative_error(gradient, plain_gradients[name]) < 1e-3, name  # a sum in another order may move a code


def test_recomputed_is_kept() -> None:
    kept, recomputed = (run(build("blockwise", fused=True, keep=keep)) for keep in ("bf16", "recompute"))
    assert torch.equal(kept[0], recomputed[0])
    assert all(torch.equal(gradient, recomputed[1][name]) for name, gradient in kept[1].items())


def test_codes_instead_of_gate_and_up_change_gradients_by_their_rounding() -> None:
    kept, codes = (run(build("blockwise", fused=True, keep=keep)) for keep in ("bf16", "fp8"))
    assert torch.equal(kept[0], codes[0]), "the forward pass is the same"
    for name in ("gate_proj", "up_proj", "down_proj"):
        weight = f"model.layers.1.mlp.{name}.weight"
        assert 0 < relative_error(codes[1][weight], kept[1][weight]) < 0.05


def test_without_gradients_the_output_is_the_same() -> None:
    model = build("hybrid", fused=True, keep="fp8")
    ids, positions = torch.arange(20)[None], torch.arange(20)[None]
    with torch.no_grad():
        inferred = model(ids, positions, causal_attention)
    assert torch.equal(inferred, model(ids, positions, causal_attention))


def test_a_mlp_keeps_codes_only() -> None:
    model = build("blockwise", fused=True, keep="fp8")
    mlp, norm = model.model.layers[0].mlp, model.model.layers[0].post_attention_layernorm
    inner, hidden, tokens = *mlp.gate_proj.weight.shape, 512
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mlp(*torch.randn(2, 1, tokens, hidden, requires_grad=True), norm)
    assert sum(t.numel() for t in saved if t.dtype != reference.FP8) < 1.1 * tokens * hidden, "beside x only scales"
    codes = sum(t.numel() for t in saved if t.dtype == reference.FP8)
    assert codes == tokens * (hidden + 2 * inner) + 3 * inner * hidden, "the input's, gate's, up's and the weights'"


def test_a_layer_shows_its_rows_of_the_group() -> None:
    attention = build("blockwise", fused=True).model.layers[0].self_attn
    group = attention.fused_projections.group
    for linear in group.linears:
        alone = reference.quantize(linear.weight.detach().bfloat16(), "block", "ue8m0")
        assert torch.equal(linear.weight_operand().codes.view(torch.uint8), alone[0].view(torch.uint8))
        assert torch.equal(linear.weight_operand().scale, alone[1])
        assert linear.weight_operand().codes.untyped_storage().data_ptr() == group.operand().codes.data_ptr()


def test_health_of_fused_layers_is_that_of_single_ones() -> None:
    rows = []
    for fused in (True, False):
        model = build("blockwise", fused=fused)
        with measure(model) as health:
            run(model)
        rows.append(health.layers())
    assert rows[0].keys() == rows[1].keys()
    assert len(rows[0]) == 14
    for name, row in rows[0].items():
        assert row == pytest.approx(rows[1][name], rel=1e-2, abs=1e-4), name


def test_health_reads_every_operand_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Tensor] = []
    true = health_module.fidelity

    def noting(values: Tensor, codes: Tensor, *rest: Any) -> Tensor:
        read.append(codes)
        return true(values, codes, *rest)

    monkeypatch.setattr(health_module, "fidelity", noting)
    model = build("hybrid", fused=True)
    with measure(model) as health:
        run(model)
    assert len(health.layers()) == 14
    # A layer: seven weights, seven gradients, and four inputs (q, k and v read one, gate and up another).
    assert len(read) == 2 * (7 + 7 + 4)


def test_a_nan_reaches_the_gradients() -> None:
    model = build("hybrid", fused=True, keep="fp8")
    with torch.no_grad():
        model.model.embed_tokens.weight[7, 3] = torch.inf
    ids = torch.tensor([[1, 7, 2, 3]])
    loss = model(ids, torch.arange(4)[None], causal_attention).sum()
    loss.backward()
    assert not loss.isfinite()
    assert not model.model.layers[0].mlp.up_proj.weight.grad.isfinite().all()


# Kernels: the formulas against autograd, and the operand of the transpose


def test_norm_and_its_backward_against_autograd() -> None:
    x = torch.randn(10, 64, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(64, dtype=torch.float64, requires_grad=True)
    y = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
    grad, residual = torch.randn(2, 10, 64, dtype=torch.float64)
    (y * grad + x * residual).sum().backward()
    x32, weight32 = (tensor.detach().float().requires_grad_() for tensor in (x, weight))
    normed, stream = fork(x32.unflatten(0, (2, 5)), weight32, 1e-6)
    assert torch.equal(normed.flatten(0, 1), rms_norm(x32, weight32, 1e-6))
    assert relative_error(normed.flatten(0, 1), y.detach()) < 1e-6
    assert torch.equal(stream.flatten(0, 1), x32)
    (normed.flatten(0, 1) * grad.float() + stream.flatten(0, 1) * residual.float()).sum().backward()
    assert relative_error(x32.grad, x.grad) < 1e-6
    assert relative_error(weight32.grad, weight.grad) < 1e-6


def test_the_gradients_that_meet_in_a_norm_are_rounded_once() -> None:
    x, grad, residual = torch.randn(3, 50, 128).bfloat16()
    weight = torch.randn(128).bfloat16().float()
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        leaf = x.to(dtype, copy=True).requires_grad_()
        normed, stream = fork(leaf, weight, 1e-6)
        torch.autograd.backward((normed, stream), (grad.to(dtype), residual.to(dtype)))
        gradients.append(leaf.grad)
    assert torch.equal(gradients[0], gradients[1].bfloat16())


def test_a_norm_adds_the_update_first() -> None:
    x, update, weight = *torch.randn(2, 40, 256).bfloat16(), torch.randn(256)
    *got, total = norm_quantize(x, weight, 1e-6, True, update)
    *expected, nothing = norm_quantize(x + update, weight, 1e-6, True)
    assert torch.equal(total, x + update)
    assert nothing.shape == (0, 256)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours.float(), theirs.float())


def test_swiglu_and_its_backward_against_autograd() -> None:
    gate_up = torch.randn(10, 256, dtype=torch.float64, requires_grad=True)
    gate, up = gate_up.chunk(2, dim=-1)
    y = torch.nn.functional.silu(gate) * up
    grad = torch.randn(10, 128, dtype=torch.float64)
    y.backward(grad)
    assert relative_error(swiglu(gate_up.detach().float()), y.detach()) < 1e-6
    assert relative_error(swiglu_backward(grad.float(), gate_up.detach().float()), gate_up.grad) < 1e-6


def test_quantising_ops_are_the_formula_then_the_quantiser() -> None:
    x, gate_up, grad = torch.randn(40, 128).bfloat16(), torch.randn(40, 256).bfloat16(), torch.randn(40, 128).bfloat16()
    weight = torch.randn(128)

    def same(got: tuple[Tensor, ...], values: Tensor) -> None:
        codes, scale = reference.quantize(values, "tile", "ue8m0")
        assert torch.equal(got[0].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(got[1], scale)

    same(norm_quantize(x, weight, 1e-6, False), rms_norm(x, weight, 1e-6))
    forward = swiglu_quantize(gate_up, True)
    same(forward[:2], swiglu(gate_up))
    same(forward[2:], gate_up)
    backward = swiglu_backward_quantize(grad, gate_up, gate_up.new_empty(0), True)
    same(backward[:2], swiglu_backward(grad, gate_up))
    same(backward[3:5], swiglu(gate_up))
    from_codes = swiglu_backward_quantize(grad, forward[2], forward[3], False)
    wide = reference.dequantize(forward[2], forward[3], "tile")
    same(from_codes[:2], swiglu_backward(grad, wide))


@pytest.mark.parametrize("granularity", ["tile", "channel"])
def test_the_transpose_of_codes_is_exact_in_range(granularity: str) -> None:
    x = torch.randn(200, 256)  # magnitudes within a few powers of two: no code becomes subnormal
    x = x.sign() * x.abs().clamp(0.1)
    codes, scale, amax = quantize_rows(x, True)
    values = reference.dequantize(codes, scale, "tile")
    assert torch.equal(amax.amax(0), x.abs().amax(0))
    back = reference.dequantize(*transpose_rows(codes, scale, amax, granularity), granularity)
    assert torch.equal(back, values.T)


@pytest.mark.parametrize("granularity", ["tile", "channel"])
def test_the_transpose_of_codes_loses_what_any_fp8_loses(granularity: str) -> None:
    """Rows of very different size: the error stays that of quantising the transpose itself, within its rounding."""
    x = torch.randn(256, 128) * torch.exp2(torch.randint(-12, 3, (256, 1)).float())
    codes, scale, amax = quantize_rows(x, True)
    derived = reference.dequantize(*transpose_rows(codes, scale, amax, granularity), granularity)
    direct = reference.dequantize(*reference.quantize(x.T.contiguous(), granularity, "ue8m0"), granularity)
    assert relative_error(derived, x.T) < 1.05 * relative_error(direct, x.T)


def test_a_nan_stays_a_fault_in_the_transpose() -> None:
    x = torch.randn(130, 128)
    x[3, 5] = torch.nan
    codes, scale, amax = quantize_rows(x, True)
    for granularity in ("tile", "channel"):
        decoded = reference.dequantize(*transpose_rows(codes, scale, amax, granularity), granularity)
        assert decoded[:, 3].isnan().all()


def test_joined_biases_follow_their_parameters_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph may have recorded where they lie, as it may have the codes."""
    model = build("blockwise", fused=True)
    for layer in model.model.layers:
        layer.self_attn.fused_heads = None  # as where queries and keys are normalised
    group = model.model.layers[0].self_attn.fused_projections.group
    ids, positions = torch.arange(TOKENS)[None], torch.arange(TOKENS)[None]

    def logits(joined: bool) -> Tensor:
        with torch.no_grad(), monkeypatch.context() as patch:
            patch.setattr(group_module, "inference_on_cuda", lambda x: joined)
            return model(ids, positions, causal_attention)

    torch.testing.assert_close(logits(True), logits(False))
    place = group._bias.data_ptr()
    with torch.no_grad():
        for linear in group.linears:
            linear.bias.add_(1.0)
    refresh_weights(model)
    torch.testing.assert_close(logits(True), logits(False))
    assert group._bias.data_ptr() == place
