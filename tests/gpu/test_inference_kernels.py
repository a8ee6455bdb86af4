"""Kernels of passes that keep nothing for a backward pass: against their twins, and in the model that uses them."""

import dataclasses

import pytest
import torch
from tensors import relative_error
from torch import Tensor

from infir2.fp8.tensor import Operand
from infir2.kernels.add_norm import add_norm, add_norm_quantize
from infir2.kernels.norm import rms_norm
from infir2.kernels.operand import with_layout
from infir2.kernels.paged_layout import empty_cache
from infir2.kernels.reference import BLOCK, FP8, scale_shape
from infir2.kernels.rotary import rotate
from infir2.kernels.rotary_qkv_cache import HeadNorms, rotate_qkv_into_cache
from infir2.kernels.split_k import PartialSums, Split
from infir2.kernels.swiglu import silu_mul
from infir2.model.attention import causal_attention
from infir2.model.presets import preset
from infir2.model.transformer import CausalLM

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 3).to(dtype)


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Sums in another order and another exp: the last bit of float32, and now and then a neighbour in bfloat16."""
    got = got.cpu()
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    if got.dtype == torch.float32:
        torch.testing.assert_close(got, expected, rtol=3e-6, atol=1e-6)
    else:
        torch.testing.assert_close(got, expected, rtol=2.0**-6, atol=1e-6)
        assert (got != expected).float().mean() < 5e-3


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 1536), (1, 300, 1536), (2, 17, 3584), (5, 200), (1, 9, 12, 128)])
@torch.no_grad()
def test_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = normal(*shape, dtype=dtype), torch.rand(shape[-1]) + 0.5
    assert_close(rms_norm(x.cuda(), weight.cuda(), 1e-6), rms_norm(x, weight, 1e-6))


@DTYPES
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(12, 2, 128), (28, 4, 128), (3, 1, 64), (6, 2, 48)])
@torch.no_grad()
def test_heads_in_the_rows_of_one_matrix(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """As the joined projections leave them: no copy is made, and each is turned and normalised in its own place."""
    sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    rows = normal(1, 33, sum(sizes), dtype=dtype)
    angles = torch.rand(1, 33, head_dim // 2) * 6
    weight = torch.rand(head_dim) + 0.5
    q, k, _ = (part.unflatten(-1, (-1, head_dim)) for part in rows.split(sizes, dim=-1))
    cq, ck, _ = (part.unflatten(-1, (-1, head_dim)) for part in rows.cuda().split(sizes, dim=-1))
    got = rotate(cq, ck, angles.cos().cuda(), angles.sin().cuda())
    for ours, expected in zip(got, rotate(q, k, angles.cos(), angles.sin()), strict=True):
        assert_close(ours, expected)
    for ours, expected in ((cq, q), (ck, k)):
        assert_close(rms_norm(ours, weight.cuda(), 1e-6), rms_norm(expected, weight, 1e-6))


@DTYPES
@pytest.mark.parametrize("inner", [112, 8960])
@torch.no_grad()
def test_swiglu(inner: int, dtype: torch.dtype) -> None:
    gate_up = normal(1, 50, 2 * inner, dtype=dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    assert_close(silu_mul(*gate_up.cuda().chunk(2, dim=-1)), silu_mul(gate, up))
    assert_close(silu_mul(gate.contiguous().cuda(), up.contiguous().cuda()), silu_mul(gate, up))


SPLIT_K_SHAPES = [  # outputs, contraction
    (2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960),  # qwen2.5-1.5b
    (4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944),  # qwen2.5-7b
    (128, 128), (384, 256), (640, 1152), (1152, 512),
]  # fmt: skip
ROWS = pytest.mark.parametrize("rows", [1, 17, 128, 256])


def split_k_matmul(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    from infir2.kernels import split_k_triton

    assert torch.cuda.get_device_capability() == (9, 0), "TMA and FP8 tensor cores: needs Hopper"
    return split_k_triton.scaled_mm(a.codes, a.scale, b.codes, b.scale, dtype)


@ROWS
@pytest.mark.parametrize("shape", SPLIT_K_SHAPES)
def test_split_k_against_float64(shape: tuple[int, int], rows: int) -> None:
    torch.manual_seed(sum(shape))
    outputs, contraction = shape
    a = Operand.quantize(torch.randn(rows, contraction, device="cuda"), "tile", "fp32")
    b = Operand.quantize(torch.randn(outputs, contraction, device="cuda"), "block", "fp32")
    expected = a.dequantize(torch.float64) @ b.dequantize(torch.float64).T
    exact = split_k_matmul(a, b, torch.float32)
    # Tensor cores cut the products of a block of 128 to some 14 bits: no float32 sum of FP8 products is nearer.
    assert relative_error(exact, expected) < 1e-3
    rounded = split_k_matmul(a, b, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, exact.bfloat16())
    assert all(torch.equal(split_k_matmul(a, b, torch.float32), exact) for _ in range(5)), "not the same bits each time"


@ROWS
@pytest.mark.parametrize("shape", SPLIT_K_SHAPES)
def test_split_k_adds_whole_numbers_and_scales_exactly(shape: tuple[int, int], rows: int) -> None:
    """Codes of -2 to 2: tensor cores lose nothing of 128 such products, and float32 little of the scaled sums."""
    torch.manual_seed(sum(shape))
    operands = []
    for count, granularity in ((rows, "tile"), (shape[0], "block")):
        codes = torch.randint(-2, 3, (count, shape[1]), device="cuda").float().to(FP8)
        scale = torch.rand(scale_shape(granularity, count, shape[1]), device="cuda") + 0.5
        operands.append(Operand(codes, with_layout(scale, granularity), granularity))
    a, b = operands
    expected = a.dequantize(torch.float64) @ b.dequantize(torch.float64).T
    assert relative_error(split_k_matmul(a, b, torch.float32), expected) < 1e-6
    assert relative_error(split_k_matmul(a, b, torch.bfloat16), expected) < 5e-3


def test_split_k_passes_faults_on() -> None:
    """A scale of NaN, as a block with Inf has, reaches the outputs of its row, or of its 128 columns, and no others."""
    x, w = normal(40, 512, dtype=torch.bfloat16).cuda(), normal(384, 512, dtype=torch.bfloat16).cuda()
    x[7, 300], w[200, 3] = torch.inf, torch.nan
    got = split_k_matmul(Operand.quantize(x, "tile", "ue8m0"), Operand.quantize(w, "block", "ue8m0"), torch.float32)
    wrong = torch.zeros(40, 384, dtype=torch.bool)
    wrong[7], wrong[:, 128:256] = True, True
    assert torch.equal(got.isnan().cpu(), wrong)


@pytest.mark.parametrize("shape", [(1536, 1536), (3584, 3584), (1536, 8960), (3584, 18944), (640, 1152)])
def test_split_k_of_a_row_does_not_depend_on_the_others(shape: tuple[int, int]) -> None:
    torch.manual_seed(sum(shape))
    a = Operand.quantize(torch.randn(256, shape[1], device="cuda"), "tile", "ue8m0")
    b = Operand.quantize(torch.randn(shape, device="cuda"), "block", "ue8m0")
    together = split_k_matmul(a, b, torch.float32)
    for rows in (1, 60, 65, 128, 200):
        few = Operand(a.codes[:rows], with_layout(a.scale[:rows], "tile"), "tile")
        assert torch.equal(split_k_matmul(few, b, torch.float32), together[:rows]), rows


@pytest.mark.parametrize("rows", [1, 17, 128, 256, 300])
@pytest.mark.parametrize("programs", [28, 56, 112, 66, 132, 100])
@pytest.mark.parametrize("height", [128, 256])
def test_split_k_in_any_tiles_and_parts(height: int, programs: int, rows: int) -> None:
    from infir2.kernels import split_k_triton

    torch.manual_seed(rows)
    a = Operand.quantize(torch.randn(rows, 1152, device="cuda"), "tile", "ue8m0")
    b = Operand.quantize(torch.randn(3584, 1152, device="cuda"), "block", "ue8m0")
    tile, split = split_k_triton._TILES[height], Split(28, 9, programs)
    product = split_k_triton.multiply(a.codes, a.scale, b.codes, b.scale, rows, torch.float32, tile, split)
    if isinstance(product, PartialSums):
        joined = split_k_triton.join(product, torch.float32)
        assert torch.equal(joined, product.total(torch.float32)), "the parts are not added in their order"
        product = joined
    expected = a.dequantize(torch.float64) @ b.dequantize(torch.float64).T
    assert relative_error(product, expected) < 1e-3


def parts_for(rows: int, outputs: int, programs: int, blocks: int = 10) -> PartialSums:
    split = Split(outputs // BLOCK, blocks, programs)
    return PartialSums(torch.randn(split.most, rows, outputs), split)


@DTYPES
@pytest.mark.parametrize("cols", [384, 1536, 3584])
@pytest.mark.parametrize("kind", ["whole", "even parts", "uneven parts"])
@torch.no_grad()
def test_the_end_of_a_branch(kind: str, cols: int, dtype: torch.dtype) -> None:
    torch.manual_seed(cols)
    rows, tiles = 37, cols // BLOCK
    residual, weight = torch.randn(rows, cols).to(dtype), torch.rand(cols) + 0.5
    programs = {"whole": 0, "even parts": 4 * tiles, "uneven parts": 5 * tiles - 1}[kind]
    branch = parts_for(rows, cols, programs) if programs else torch.randn(rows, cols).to(dtype)
    on_gpu = PartialSums(branch.sums.cuda(), branch.split) if isinstance(branch, PartialSums) else branch.cuda()
    expected, normed = add_norm(residual, branch, weight, 1e-6)
    got, got_normed = add_norm(residual.cuda(), on_gpu, weight.cuda(), 1e-6)
    assert torch.equal(got.cpu(), expected), "sums are added in the same order"
    assert_close(got_normed, normed)
    _, codes, scale = add_norm_quantize(residual, branch, weight, 1e-6, 128)
    got, got_codes, got_scale = add_norm_quantize(residual.cuda(), on_gpu, weight.cuda(), 1e-6, 128)
    assert torch.equal(got.cpu(), expected)
    assert_same_codes((got_codes[:rows], got_scale[:rows]), (codes[:rows], scale[:rows]))


def assert_same_codes(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """But for values that were rounded to a neighbour before."""
    same = got[0].cpu().view(torch.uint8) == expected[0].view(torch.uint8)
    assert (got[1].cpu() == expected[1]).float().mean() > 0.995
    assert same.float().mean() > 0.99


@DTYPES
@pytest.mark.parametrize("cache_dtype", ["same", "fp8"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(12, 2, 128), (28, 4, 128), (4, 1, 32)])
@torch.no_grad()
def test_from_projections_to_the_cache(
    heads: int, kv_heads: int, head_dim: int, normed: bool, biased: bool, cache_dtype: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(heads)
    tokens, width = 21, (heads + 2 * kv_heads) * head_dim
    qkv, bias = torch.randn(32, width).to(dtype), torch.randn(width).to(dtype) if biased else None
    norms = HeadNorms(torch.rand(head_dim) + 0.5, torch.rand(head_dim) + 0.5, 1e-6) if normed else None
    angles, slots = torch.rand(tokens, head_dim // 2) * 6, torch.randperm(64)[:tokens]
    stored = FP8 if cache_dtype == "fp8" else dtype
    caches = [empty_cache(4, 16, kv_heads, head_dim, stored, device) for device in ("cpu", "cuda")]
    q = rotate_qkv_into_cache(qkv, bias, norms, angles.cos(), angles.sin(), caches[0], slots)
    moved = [None if x is None else x.cuda() for x in (bias, angles.cos(), angles.sin(), slots)]
    moved_norms = None if norms is None else HeadNorms(norms.query_weight.cuda(), norms.key_weight.cuda(), norms.eps)
    got = rotate_qkv_into_cache(qkv.cuda(), moved[0], moved_norms, moved[1], moved[2], caches[1], moved[3])
    assert_close(got, q)
    place = slots // 16, slots % 16
    for name, pool in vars(caches[0]).items():
        if pool is not None:
            ours, expected = getattr(caches[1], name).cpu()[place], pool[place]
            if pool.dtype == FP8:
                assert (ours.view(torch.uint8) == expected.view(torch.uint8)).float().mean() > 0.99
            else:
                assert_close(ours, expected)


def test_a_cuda_graph_replays_split_k() -> None:
    """With the contraction in parts, that is with a second kernel that starts before the first has ended."""
    b = Operand.quantize(normal(1536, 8960, dtype=torch.bfloat16).cuda(), "block", "ue8m0")
    xs = [torch.randn(256, 8960, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    operands = [Operand.quantize(x, "tile", "ue8m0") for x in xs]
    a = Operand(operands[0].codes.clone(), with_layout(operands[0].scale, "tile"), "tile")
    expected = [split_k_matmul(operand, b, torch.bfloat16) for operand in operands]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [split_k_matmul(a, b, torch.bfloat16) for _ in range(20)]
    for operand, same in zip(operands, expected, strict=True):
        operand.moved_into(a)
        graph.replay()
        assert all(torch.equal(each, same) for each in got)


def test_few_tokens_take_split_k() -> None:
    a = Operand.quantize(normal(256, 8960, dtype=torch.bfloat16).cuda(), "tile", "ue8m0")
    b = Operand.quantize(normal(1536, 8960, dtype=torch.bfloat16).cuda(), "block", "ue8m0")
    assert torch.equal(a.matmul(b, torch.bfloat16), split_k_matmul(a, b, torch.bfloat16))


def test_where_gradients_are_wanted_the_twins_run() -> None:
    x = normal(4, 256, dtype=torch.float32).cuda().requires_grad_()
    weight = torch.ones(256, device="cuda", requires_grad=True)
    rms_norm(x, weight, 1e-6).sum().backward()
    gate = normal(4, 64, dtype=torch.float32).cuda().requires_grad_()
    silu_mul(gate, gate).sum().backward()
    assert all(tensor.grad is not None for tensor in (x, weight, gate))


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_a_model_computes_the_same_with_and_without_gradients(name: str) -> None:
    config = dataclasses.replace(
        preset("tiny", 512), num_hidden_layers=2, model_type=name, qkv_bias=name == "qwen2", qk_norm=name == "qwen3"
    )
    model = CausalLM(config, torch.bfloat16).to("cuda")
    model.init_weights(3)
    ids = torch.randint(0, 512, (1, 90), generator=torch.Generator().manual_seed(1)).cuda()
    positions = torch.arange(90, device="cuda")[None]
    expected = model(ids, positions, causal_attention)
    model.cast_weights()
    with torch.no_grad():
        got = model(ids, positions, causal_attention)
    assert (got - expected).abs().max() < 0.03 * expected.abs().max()
