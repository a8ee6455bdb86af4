"""Kernels on the GPU against their plain-torch twins and against float64."""

import pytest
import torch
from tensors import relative_error
from torch import Tensor, nn

from infir2.fp8.linear import Fp8Linear
from infir2.fp8.recipe import RECIPE_NAMES, recipe_named
from infir2.fp8.tensor import Operand
from infir2.kernels import reference
from infir2.kernels.cross_entropy import cross_entropy_sum
from infir2.kernels.quantize import quantize, quantize_both
from infir2.model.linear import Linear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
FP8_RECIPES = [name for name in RECIPE_NAMES if name != "bf16"]


def awkward(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Random numbers of every magnitude, with zeros, zero blocks, subnormals, Inf and NaN."""
    generator = torch.Generator().manual_seed(rows * 10007 + cols)
    exponent = torch.randint(-148, 127, (rows, 1 + cols // 64), generator=generator).repeat_interleave(64, 1)[:, :cols]
    x = torch.randn(rows, cols, generator=generator).double() * torch.exp2(exponent.double())
    x = x.clamp(-3e38, 3e38).to(dtype)
    x[torch.rand(x.shape, generator=generator) < 0.05] = 0.0
    x[: rows // 3, : cols // 2] = 0.0
    if rows > 200 and cols > 200:
        x[150, 150], x[151, 3], x[-1, -1] = torch.nan, torch.inf, -torch.inf
    return x


def assert_same_operand(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], what: str) -> None:
    codes, scale = (t.cpu() for t in got)
    wrong = (codes.view(torch.uint8) != expected[0].view(torch.uint8)).sum().item()
    assert wrong == 0, f"{what}: {wrong} of {codes.numel()} codes differ"
    assert torch.equal(scale.nan_to_num(-1.0), expected[1].nan_to_num(-1.0)), f"{what}: scales differ"


@pytest.mark.parametrize("scale_format", reference.SCALE_FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(512, 768), (256, 1536), (1, 1), (130, 257), (384, 129), (1000, 333)])
def test_triton_equals_reference_bit_for_bit(shape: tuple, dtype: torch.dtype, scale_format: str) -> None:
    x = awkward(*shape, dtype)
    for granularity in reference.GRANULARITIES:
        for transpose in (False, True):
            got = quantize(x.cuda(), granularity, scale_format, transpose)
            expected = reference.quantize(x, granularity, scale_format, transpose)
            assert_same_operand(got, expected, f"{granularity} transpose={transpose} {shape} {dtype} {scale_format}")
    both = quantize_both(x.cuda(), "tile", "tile", scale_format)
    assert_same_operand(both[:2], reference.quantize(x, "tile", scale_format), "both, rows")
    assert_same_operand(both[2:], reference.quantize(x, "tile", scale_format, True), "both, columns")


@pytest.mark.parametrize("scale_format", reference.SCALE_FORMATS)
def test_triton_equals_reference_on_every_bfloat16(scale_format: str) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for x in (values[:, None], torch.stack([values, torch.full_like(values, 448.0)], 1)):
        got = quantize(x.cuda(), "tile", scale_format)
        assert_same_operand(got, reference.quantize(x, "tile", scale_format), scale_format)


@pytest.mark.parametrize("scale_format", reference.SCALE_FORMATS)
def test_triton_equals_reference_on_a_million_blocks(scale_format: str) -> None:
    generator = torch.Generator().manual_seed(11)
    for _ in range(10):
        x = torch.randn(100_000, 128, generator=generator)
        x *= torch.exp2(torch.randint(-30, 30, (100_000, 1), generator=generator).float())
        got = quantize(x.cuda(), "tile", scale_format)
        assert_same_operand(got, reference.quantize(x, "tile", scale_format), scale_format)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale_format", reference.SCALE_FORMATS)
@pytest.mark.parametrize(
    "pair", [("tile", "block"), ("tile", "tile"), ("channel", "channel"), ("tensor", "tensor"), ("tile", "channel")]
)
@pytest.mark.parametrize("shape", [(256, 384, 640), (1024, 1536, 8960), (100, 60, 50)])
def test_gemm_against_float64(shape: tuple, pair: tuple, scale_format: str, out_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    m, n, k = shape
    a = Operand.quantize(torch.randn(m, k, device="cuda"), pair[0], scale_format)
    b = Operand.quantize(torch.randn(n, k, device="cuda"), pair[1], scale_format)
    expected = a.dequantize(torch.float64) @ b.dequantize(torch.float64).T
    got = a.matmul(b, out_dtype)
    assert got.dtype == out_dtype
    exactly_scaled = scale_format == "ue8m0"  # also where operands are dequantised to bfloat16
    assert relative_error(got, expected) < (5e-4 if out_dtype == torch.float32 and exactly_scaled else 5e-3)


@pytest.mark.parametrize("scale_format", reference.SCALE_FORMATS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(512, 1536, 2048), (1000, 1536, 256), (77, 100, 60), (1, 256, 128)])
@pytest.mark.parametrize("name", FP8_RECIPES)
def test_linear_against_float64(name: str, shape: tuple, bias: bool, scale_format: str) -> None:
    torch.manual_seed(0)
    tokens, inputs, outputs = shape
    recipe = recipe_named(name, scale_format)
    layer = Fp8Linear.from_linear(nn.Linear(inputs, outputs, bias=bias, device="cuda"), recipe)
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(tokens, outputs, device="cuda", dtype=torch.bfloat16)
    y = layer(x)
    y.backward(grad)
    weight = layer.weight.detach().bfloat16()

    def exact(t: Tensor, granularity: str, transpose: bool = False) -> Tensor:
        return Operand.quantize(t, granularity, scale_format, transpose).dequantize(torch.float64)

    offset = layer.bias.detach().double() if bias else 0.0
    assert relative_error(y, exact(x.detach(), recipe.x) @ exact(weight, recipe.weight).T + offset) < 5e-3
    assert relative_error(x.grad, exact(grad, recipe.grad) @ exact(weight, recipe.weight, True).T) < 5e-3
    dw = exact(grad, recipe.grad_wgrad, True) @ exact(x.detach(), recipe.x_wgrad, True).T
    assert relative_error(layer.weight.grad, dw) < 5e-3


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_gradient_of_a_float32_master_is_not_rounded(bias: bool, compiled: bool) -> None:
    torch.manual_seed(0)
    layer = Linear(384, 640, bias=bias).cuda()
    x, grad = (torch.randn(2, 512, size, device="cuda", dtype=torch.bfloat16) for size in (384, 640))
    x.requires_grad_()
    y = (torch.compile(layer) if compiled else layer)(x)
    y.backward(grad)
    weight = layer.weight.detach().bfloat16().double()
    offset = layer.bias.detach().double() if bias else 0.0
    assert relative_error(y, x.detach().double() @ weight.T + offset) < 5e-3
    assert relative_error(x.grad, grad.double() @ weight) < 5e-3
    assert relative_error(layer.weight.grad, grad.double().flatten(0, 1).T @ x.detach().double().flatten(0, 1)) < 1e-5
    if bias:
        assert relative_error(layer.bias.grad, grad.double().sum((0, 1))) < 5e-3


def test_a_nan_reaches_the_output() -> None:
    layer = Fp8Linear.from_linear(nn.Linear(256, 256, device="cuda"), recipe_named("blockwise"))
    x = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16)
    x[5, 5] = torch.inf
    y = layer(x.requires_grad_())
    assert y[5].isnan().all()
    assert y[6:].isfinite().all()
    y.sum().backward()
    assert not layer.weight.grad.isfinite().all()


def test_cross_entropy_against_float64() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3000, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(50_000, 512, device="cuda") * 0.05).requires_grad_()
    labels = torch.randint(0, 50_000, (3000,), device="cuda")
    labels[:100] = -100
    loss = cross_entropy_sum(hidden, weight, labels)
    loss.backward()
    h64, w64 = hidden.detach().double().requires_grad_(), weight.detach().bfloat16().double().requires_grad_()
    expected = nn.functional.cross_entropy(h64 @ w64.T, labels, reduction="sum")
    expected.backward()
    assert relative_error(loss, expected) < 1e-4
    assert relative_error(hidden.grad, h64.grad) < 1e-2
    assert relative_error(weight.grad, w64.grad) < 1e-2
