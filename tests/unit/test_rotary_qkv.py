"""Bias and rotary positions between projections and attention: the twins against autograd through the single steps."""

import pytest
import torch
from torch import Tensor

from infir2.kernels.rotary import rotate
from infir2.kernels.rotary_qkv import heads_fit, rotate_qkv, rotate_qkv_backward, rotate_qkv_backward_quantize
from infir2.kernels.row_codes import encode_rows

TOKENS, HEADS, KV_HEADS = 12, 4, 2


def inputs(head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(head_dim)
    width = (HEADS + 2 * KV_HEADS) * head_dim
    angles = torch.rand(TOKENS, head_dim // 2, generator=generator) * 6
    qkv, bias = torch.randn(TOKENS, width, generator=generator), torch.randn(width, generator=generator)
    return qkv.to(dtype), bias.to(dtype), angles.cos(), angles.sin()


def single_steps(qkv: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    head_dim = 2 * cos.shape[1]
    q, k, v = (qkv if bias is None else qkv + bias).split([h * head_dim for h in (HEADS, KV_HEADS, KV_HEADS)], dim=1)
    q, k, v = (part.unflatten(1, (-1, head_dim)) for part in (q, k, v))
    q, k = rotate(q[None], k[None], cos[None], sin[None])
    return q[0], k[0], v


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_twins_are_the_single_steps_and_their_gradient(head_dim: int, dtype: torch.dtype, biased: bool) -> None:
    qkv, bias, cos, sin = inputs(head_dim, dtype)
    leaves = [qkv.requires_grad_(), *([bias.requires_grad_()] if biased else [])]
    expected = single_steps(qkv, bias if biased else None, cos, sin)
    with torch.no_grad():
        got = rotate_qkv(qkv, bias if biased else None, cos, sin, KV_HEADS)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))

    grads = [torch.randn_like(part) for part in expected]
    d_qkv, *d_bias = torch.autograd.grad(expected, leaves, grads)
    assert torch.equal(rotate_qkv_backward(*grads, cos, sin), d_qkv)
    *codes, sums = rotate_qkv_backward_quantize(*grads, cos, sin, 128, True, biased)
    padded = torch.cat([d_qkv, d_qkv.new_zeros(128 - TOKENS, d_qkv.shape[1])])
    for ours, theirs in zip(codes, encode_rows(padded, True), strict=True):
        assert torch.equal(ours.float(), theirs.float())
    assert sums.shape[0] == int(biased)
    for expected_bias in d_bias:
        torch.testing.assert_close(sums.sum(0), expected_bias.float(), rtol=2e-2, atol=2e-2)


def test_which_heads_fit() -> None:
    assert heads_fit(128, [1536, 256, 256])
    assert heads_fit(64, [256, 128, 128])
    assert not heads_fit(64, [256, 64, 64]), "a head that shares its block of 128 columns with another projection's"
    assert not heads_fit(80, [1280, 1280, 1280])
