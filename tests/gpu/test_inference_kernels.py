"""Kernels of passes that keep nothing for a backward pass: against their twins, and in the model that uses them."""

import dataclasses

import pytest
import torch
from torch import Tensor

from infir2.kernels.norm import rms_norm
from infir2.kernels.rotary import rotate
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
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(12, 2, 128), (28, 4, 128), (3, 1, 64)])
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
