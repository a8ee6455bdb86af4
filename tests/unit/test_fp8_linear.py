"""Fp8Linear on the CPU: three GEMMs against float64 products of the dequantised operands."""

import pytest
import torch
from tensors import relative_error
from torch import Tensor, nn

from infir2.fp8.convert import convert, keep_outer_layers, refresh_weights
from infir2.fp8.health import measure
from infir2.fp8.linear import Fp8Linear
from infir2.fp8.recipe import RECIPE_NAMES, recipe_named
from infir2.kernels import reference
from infir2.kernels.matmul import _right_scale
from infir2.kernels.operand import with_layout

FP8_RECIPES = [name for name in RECIPE_NAMES if name != "bf16"]


def quantized64(x: Tensor, granularity: str, scale_format: str) -> Tensor:
    return reference.dequantize(*reference.quantize(x, granularity, scale_format), granularity, torch.float64)


@pytest.mark.parametrize("scale_format", ["ue8m0", "fp32"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(256, 384, 128), (33, 100, 57), (1, 129, 300)])
@pytest.mark.parametrize("name", FP8_RECIPES)
def test_three_gemms_against_float64(name: str, shape: tuple, bias: bool, scale_format: str) -> None:
    torch.manual_seed(0)
    tokens, inputs, outputs = shape
    recipe = recipe_named(name, scale_format)
    layer = Fp8Linear.from_linear(nn.Linear(inputs, outputs, bias=bias), recipe)
    x = torch.randn(tokens, inputs, requires_grad=True)
    grad = torch.randn(tokens, outputs)
    y = layer(x)
    y.backward(grad)

    weight = layer.weight.detach().bfloat16()
    offset = layer.bias.detach().double() if bias else 0.0
    x64 = quantized64(x.detach(), recipe.x, scale_format)
    assert relative_error(y, x64 @ quantized64(weight, recipe.weight, scale_format).T + offset) < 1e-5
    g64 = quantized64(grad, recipe.grad, scale_format)
    assert relative_error(x.grad, g64 @ quantized64(weight.T.contiguous(), recipe.weight, scale_format).T) < 1e-5
    gt64 = quantized64(grad.T.contiguous(), recipe.grad_wgrad, scale_format)
    xt64 = quantized64(x.detach().T.contiguous(), recipe.x_wgrad, scale_format)
    assert relative_error(layer.weight.grad, gt64 @ xt64.T) < 1e-5
    if bias:
        assert relative_error(layer.bias.grad, grad.double().sum(0)) < 1e-5


def test_forward_without_gradients_is_the_same() -> None:
    layer = Fp8Linear.from_linear(nn.Linear(256, 128), recipe_named("blockwise"))
    x = torch.randn(3, 50, 256)
    with torch.no_grad():
        inferred = layer(x)
    assert torch.equal(inferred, layer(x))
    assert inferred.shape == (3, 50, 128)


def test_weight_is_quantised_once_until_refreshed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Fp8Linear.from_linear(nn.Linear(128, 128), recipe_named("blockwise"))
    calls = []
    requantize = layer._requantize
    monkeypatch.setattr(layer, "_requantize", lambda: (calls.append(1), requantize()))
    x = torch.randn(4, 128)
    first = [layer(x) for _ in range(3)][-1]
    assert len(calls) == 1
    with torch.no_grad():
        layer.weight.mul_(-1)
    assert torch.equal(layer(x) - layer.bias, first - layer.bias)
    refresh_weights(layer)
    assert torch.allclose(layer(x) - layer.bias, -(first - layer.bias))
    assert len(calls) == 2


def test_saved_for_backward_is_fp8_only() -> None:
    layer = Fp8Linear.from_linear(nn.Linear(256, 128, bias=False), recipe_named("blockwise"))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(128, 256, requires_grad=True))
    big = [t for t in saved if t.numel() >= 128 * 128]
    assert big
    assert all(t.dtype == torch.float8_e4m3fn for t in big)


def test_a_nan_reaches_loss_and_gradients() -> None:
    layer = Fp8Linear.from_linear(nn.Linear(256, 128), recipe_named("blockwise"))
    x = torch.randn(8, 256)
    x[2, 7] = torch.inf
    x.requires_grad_()
    loss = layer(x).square().mean()
    loss.backward()
    assert not loss.isfinite()
    assert not layer.weight.grad.isfinite().all()


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(128, 256), "odd": nn.Linear(128, 100)}) for _ in range(3)
        )
        self.lm_head = nn.Linear(128, 512)


def test_convert_reports_what_it_did_and_why() -> None:
    model = Toy()
    weight = model.model.layers[1]["up"].weight
    report = convert(model, recipe_named("hybrid"), keep_outer_layers(3, first=1, last=0))
    assert report.converted == ["model.layers.1.up", "model.layers.2.up"]
    assert report.kept["lm_head"] == "the output head stays in bf16"
    assert report.kept["model.layers.0.up"].startswith("first or last layer")
    assert report.kept["model.layers.1.odd"] == "shape: rows 100 is not a multiple of 128"
    assert model.model.layers[1]["up"].weight is weight
    assert "2 of 7 linear layers converted" in str(report)
    assert set(dict(Toy().named_parameters())) == set(dict(model.named_parameters()))


def test_bf16_converts_nothing() -> None:
    model = Toy()
    report = convert(model, recipe_named("bf16"))
    assert not report.converted
    assert len(report.kept) == 7
    assert not any(isinstance(m, Fp8Linear) for m in model.modules())


def test_health_counts_underflow_and_noise() -> None:
    layer = nn.Sequential(Fp8Linear.from_linear(nn.Linear(128, 128, bias=False), recipe_named("blockwise")))
    x = torch.full((1, 128), 448.0)
    x[0, :32] = 2.0**-11  # below half of e4m3's smallest subnormal, 2^-9
    x.requires_grad_()
    with measure(layer) as health:
        layer(x).sum().backward()
    row = health.layers()["0"]
    assert row["x_underflow"] == 0.25
    assert row["x_saturated"] == 0.75
    assert row["g_underflow"] == 0.0
    assert row["x_sqnr_db"] > 100
    assert 20 < row["w_sqnr_db"] < 45
    assert layer[0].health is None


def test_unknown_recipe_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown FP8 recipe 'block'"):
        recipe_named("block")


@pytest.mark.parametrize("shape", [(3, 5), (1, 5), (3, 8)])
def test_block_scales_reach_the_gemm_padded_however_they_lie(shape: tuple[int, int]) -> None:
    """torch.compile may lay them out without room behind every row, inside or at the end of longer memory."""
    scale = torch.rand(shape)
    rows, cols = shape
    pool = torch.full((rows * 8 + 16,), torch.nan)
    inside = pool[: rows * cols].view(shape).copy_(scale)
    for laid_out in (with_layout(scale, "block"), scale.clone(), *([inside] if rows > 1 else [])):
        padded = _right_scale(laid_out, "block")
        assert padded.shape == (8, rows)
        assert torch.equal(padded[:cols], scale.T)
        assert not padded[cols:].any()
