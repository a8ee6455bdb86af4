"""The reference quantiser against an independent float64 oracle, bit for bit."""

import math

import numpy as np
import pytest
import torch

from infir2.kernels import reference
from infir2.kernels.quantize import quantize, quantize_both
from infir2.kernels.transpose import transpose_operand

FORMATS = ("ue8m0", "fp32")


def oracle_scale(amax: np.ndarray, scale_format: str) -> np.ndarray:
    """float64 scales from the written rules, by frexp instead of bit masks."""
    amax = amax.astype(np.float64)
    finite = np.isfinite(amax)
    safe = np.where(finite & (amax > 0), np.maximum(amax, 448.0 * 2.0**-126), 448.0)
    if scale_format == "ue8m0":
        mantissa, exponent = np.frexp(safe / 448.0)  # float64 division by 448 is exact enough to order against 2^k:
        power = np.where(mantissa == 0.5, exponent - 1, exponent)  # a float32 amax has 24 bits, float64 has 53
        scale = np.ldexp(1.0, power)
    else:
        scale = (safe.astype(np.float32) / np.float32(448.0)).astype(np.float64)
    scale = np.where(amax == 0, 1.0, scale)
    return np.where(finite, scale, np.nan)


def oracle_codes(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Nearest e4m3 value (ties to even) of float32(x / scale), clamped to 448, as float64."""
    with np.errstate(all="ignore"):
        value = (x.astype(np.float32) / scale.astype(np.float32)).astype(np.float64)
    value = np.where(np.isnan(scale) | np.isnan(value), 0.0, np.clip(value, -448.0, 448.0))
    exponent = np.maximum(np.frexp(value)[1] - 1, -6)
    quantum = np.ldexp(1.0, exponent - 3)
    return np.rint(value / quantum) * quantum


def check_tiles(x: torch.Tensor, scale_format: str) -> None:
    """``x`` [blocks, up to 128]: every row is one 1x128 block."""
    codes, scale = reference.quantize(x, "tile", scale_format)
    values = x.float().numpy()
    expected_scale = oracle_scale(np.abs(values).max(axis=1), scale_format)
    np.testing.assert_array_equal(scale[:, 0].double().numpy(), expected_scale)
    expected = oracle_codes(values, np.broadcast_to(expected_scale[:, None], values.shape))
    got = codes.double().numpy()
    np.testing.assert_array_equal(got, expected)
    nonzero = expected != 0
    assert (np.signbit(got) == np.signbit(expected))[nonzero].all()


def every_bfloat16() -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("scale_format", FORMATS)
def test_every_bfloat16_value_alone_in_its_block(scale_format: str) -> None:
    check_tiles(every_bfloat16()[:, None], scale_format)


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("amax", [448.0, 1.0, 1.7578125, 2.0**-120, 3e38])
def test_every_bfloat16_value_beside_a_given_amax(scale_format: str, amax: float) -> None:
    values = every_bfloat16()
    values = values[values.isfinite() & (values.abs().float() <= amax)]
    check_tiles(torch.stack([values, torch.full_like(values, amax)], dim=1), scale_format)


@pytest.mark.slow
@pytest.mark.parametrize("scale_format", FORMATS)
def test_a_million_random_blocks(scale_format: str) -> None:
    generator = torch.Generator().manual_seed(7)
    for chunk in range(20):
        width = 128 if chunk % 2 == 0 else 1 + 13 * chunk % 127
        magnitude = torch.randint(-140, 127, (50_000, 1), generator=generator)
        x = torch.randn(50_000, width, generator=generator) * torch.exp2(magnitude.double()).float()
        x[torch.rand(x.shape, generator=generator) < 0.05] = 0.0
        x[::1000] = 0.0
        x[1::1000, 0], x[2::1000, width // 2], x[3::1000, -1] = torch.inf, torch.nan, -torch.inf
        check_tiles(x, scale_format)


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("granularity", reference.GRANULARITIES)
@pytest.mark.parametrize("shape", [(256, 384), (1, 1), (130, 257), (127, 129), (5, 1000)])
def test_every_granularity_is_the_oracle_on_its_blocks(granularity: str, shape: tuple, scale_format: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.exp2(torch.randint(-20, 20, shape).float())
    codes, scale = reference.quantize(x, granularity, scale_format)
    height, width = reference.block_shape(granularity, *shape)
    assert scale.shape == (math.ceil(shape[0] / height), math.ceil(shape[1] / width))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            rows, cols = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
            block = x[rows, cols].numpy()
            expected = oracle_scale(np.abs(block).max(keepdims=True), scale_format)
            assert scale[i, j].item() == expected.item()
            np.testing.assert_array_equal(codes[rows, cols].double().numpy(), oracle_codes(block, expected))


@pytest.mark.parametrize("granularity", reference.GRANULARITIES)
def test_a_fault_poisons_its_own_block_only(granularity: str) -> None:
    x = torch.randn(256, 256)
    x[3, 200] = torch.nan
    codes, scale = reference.quantize(x, granularity, "ue8m0")
    decoded = reference.dequantize(codes, scale, granularity)
    assert decoded[3, 200].isnan()
    height, width = reference.block_shape(granularity, 256, 256)
    expected = torch.zeros(256, 256, dtype=torch.bool)
    row, col = 3 // height * height, 200 // width * width
    expected[row : row + height, col : col + width] = True
    assert torch.equal(decoded.isnan(), expected)
    assert (codes.float()[expected] == 0).all()


def test_zero_blocks_have_scale_one_and_zero_codes() -> None:
    x = torch.zeros(4, 256)
    x[0, 0] = 1.0
    codes, scale = reference.quantize(x, "tile", "ue8m0")
    assert scale[0].tolist() == [2.0**-8, 1.0]
    assert (scale[1:] == 1.0).all()
    assert (codes[1:].float() == 0).all()


@pytest.mark.parametrize("granularity", reference.GRANULARITIES)
def test_transposed_operand_is_the_operand_of_the_transposed_matrix(granularity: str) -> None:
    x = torch.randn(200, 300)
    for dtype in (torch.float32, torch.bfloat16):
        codes, scale = quantize(x.to(dtype), granularity, "ue8m0", transpose=True)
        expected_codes, expected_scale = reference.quantize(x.to(dtype).T.contiguous(), granularity, "ue8m0")
        assert torch.equal(codes.view(torch.uint8), expected_codes.view(torch.uint8))
        assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("granularity", ["block", "tensor"])
def test_square_blocks_transpose_exactly(granularity: str) -> None:
    x = torch.randn(200, 300)
    codes, scale = quantize(x, granularity, "fp32")
    turned = transpose_operand(codes, scale, granularity)
    expected = quantize(x, granularity, "fp32", transpose=True)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(turned, expected))
    with pytest.raises(ValueError, match="do not transpose"):
        transpose_operand(codes, scale, "tile")


def test_quantize_both_is_two_quantisations() -> None:
    x = torch.randn(200, 300)
    both = quantize_both(x, "tile", "channel", "ue8m0")
    expected = (*quantize(x, "tile", "ue8m0"), *quantize(x, "channel", "ue8m0", transpose=True))
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(both, expected))


def test_quantising_twice_changes_no_value() -> None:
    """Codes may take the other spelling of a value (a maximum that rounded onto 224 x scale), values may not."""
    x = torch.randn(512, 512).bfloat16()
    for granularity in reference.GRANULARITIES:
        first = reference.dequantize(*reference.quantize(x, granularity, "ue8m0"), granularity)
        again = reference.dequantize(*reference.quantize(first.bfloat16(), granularity, "ue8m0"), granularity)
        assert torch.equal(first, again)
        assert torch.equal(first.bfloat16().float(), first)


def test_ue8m0_scales_are_powers_of_two_and_never_overflow() -> None:
    x = torch.randn(1000, 128) * torch.exp2(torch.randint(-100, 100, (1000, 1)).float())
    codes, scale = reference.quantize(x, "tile", "ue8m0")
    assert (torch.frexp(scale).mantissa == 0.5).all()
    top = (codes.float().abs().amax(dim=1) * scale[:, 0]).double()
    assert (x.abs().amax(dim=1).double() <= 448 * scale[:, 0].double()).all()
    assert (top > 0).all()


def test_unknown_names_are_refused() -> None:
    x = torch.randn(2, 2)
    with pytest.raises(ValueError, match="unknown granularity 'row'"):
        reference.quantize(x, "row", "ue8m0")
    with pytest.raises(ValueError, match="unknown scale format 'e8m0'"):
        reference.quantize(x, "tile", "e8m0")


@pytest.mark.parametrize("shape", [(256, 1), (1, 256), (16, 16)])
def test_the_table_of_codes_is_torchs_conversion(shape: tuple[int, int]) -> None:
    """All 256 codes, NaN and -0 among them, transposed too."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(shape)
    for given in (codes, codes.T):
        decoded = reference.dequantize(given, torch.ones(1, 1), "tensor")
        assert torch.equal(decoded.view(torch.int32), (given.float() * 1.0).view(torch.int32))


@pytest.mark.parametrize("granularity", reference.GRANULARITIES)
def test_custom_ops_tell_the_compiler_the_truth(granularity: str) -> None:
    x = torch.randn(130, 260)
    torch.library.opcheck(quantize, (x, granularity, "ue8m0", False), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(quantize, (x, granularity, "ue8m0", True), test_utils=("test_schema", "test_faketensor"))
