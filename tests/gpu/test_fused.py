"""Fused kernels on the GPU against their plain-torch twins, and the fused pieces of a layer against the CPU."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from infir2.fp8.convert import convert, refresh_weights
from infir2.fp8.recipe import recipe_named
from infir2.kernels import cross_entropy, logit_chunks, reference
from infir2.kernels.cross_entropy import softmax_gradient_
from infir2.kernels.logprob import token_gradient_, token_statistics
from infir2.kernels.norm import fork, norm_gradients, norm_quantize, rms_norm
from infir2.kernels.operand import empty_operand
from infir2.kernels.rotary_qkv import rotate_qkv, rotate_qkv_backward_quantize
from infir2.kernels.row_codes import encode_rows, quantize_rows
from infir2.kernels.swiglu import swiglu_backward_quantize, swiglu_quantize
from infir2.kernels.transpose import transpose_codes, transpose_rows, transpose_tiles_into
from infir2.model.attention import causal_attention
from infir2.model.presets import preset
from infir2.model.transformer import CausalLM
from infir2.parallel.apply import compile_layer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
QWEN3: dict[str, Any] = {"model_type": "qwen3", "qk_norm": True, "qkv_bias": False}  # not fused to its end
SHAPES = [(512, 768), (384, 1536), (256, 3584), (130, 257), (1, 128), (1000, 333)]


def values(rows: int, cols: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Numbers of very different magnitude, with zero blocks, an Inf and a NaN."""
    generator = torch.Generator().manual_seed(rows * 10007 + cols)
    x = torch.randn(rows, cols, generator=generator)
    x *= torch.exp2(torch.randint(-30, 12, (rows, 1), generator=generator).float())
    x[: rows // 3, : cols // 2] = 0.0
    if rows > 120:
        x[100, 7], x[101, 3] = torch.nan, torch.inf
    return x.to(dtype)


def assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], share: float = 0.0) -> None:
    """Codes and whatever goes with them; up to ``share`` of the codes may be a neighbour (another exp, another sum)."""
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        ours, theirs = ours.cpu(), theirs.cpu()
        if ours.dtype == reference.FP8:
            moved = (ours.view(torch.int8).int() - theirs.view(torch.int8).int()).abs()
            assert (moved != 0).sum() <= share * moved.numel()
            assert share == 0.0 or moved.max() <= 128
        elif share == 0.0:
            assert torch.equal(ours.nan_to_num(-1.0), theirs.nan_to_num(-1.0))
        elif ours.numel():
            wrong = ~torch.isclose(ours, theirs, rtol=1e-5, atol=0.0, equal_nan=True)
            assert wrong.float().mean() <= 10 * share


@pytest.mark.parametrize("amax", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_row_codes_bit_for_bit(shape: tuple, dtype: torch.dtype, amax: bool) -> None:
    x = values(*shape, dtype)
    got, expected = quantize_rows(x.cuda(), amax), encode_rows(x, amax)
    assert_same(got[:2], expected[:2])
    assert_same((got[2].amax(0),), (expected[2].amax(0),))


@pytest.mark.parametrize("granularity", ["tile", "channel"])
@pytest.mark.parametrize("shape", SHAPES)
def test_transposed_row_codes_bit_for_bit(shape: tuple, granularity: str) -> None:
    rows = encode_rows(values(*shape), True)
    got = transpose_rows(*(part.cuda() for part in rows), granularity)
    assert_same(got, reference.transpose_rows(*rows, granularity))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("tokens", "head_dim", "heads", "kv_heads"), [(300, 64, 4, 2), (1000, 128, 12, 2), (7, 32, 8, 4)]
)
def test_turned_heads_bit_for_bit(
    tokens: int, head_dim: int, heads: int, kv_heads: int, dtype: torch.dtype, biased: bool
) -> None:
    width = (heads + 2 * kv_heads) * head_dim
    angles = torch.rand(tokens, head_dim // 2, generator=torch.Generator().manual_seed(0)) * 6
    qkv, bias = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1)), torch.randn(width)
    arguments = [qkv.to(dtype), bias.to(dtype) if biased else None, angles.cos(), angles.sin()]
    expected = rotate_qkv(*arguments, kv_heads)
    got = rotate_qkv(*(None if part is None else part.cuda() for part in arguments), kv_heads)
    assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(got, expected, strict=True))
    for amax in (True, False):
        grads = [values(tokens, part[0].numel(), dtype).view_as(part) for part in expected]
        rows = tokens + -tokens % 128
        theirs = rotate_qkv_backward_quantize(*grads, *arguments[2:], rows, amax, biased)
        ours = rotate_qkv_backward_quantize(*(part.cuda() for part in (*grads, *arguments[2:])), rows, amax, biased)
        assert_same(ours[:2], theirs[:2])
        assert_same((ours[2].amax(0),), (theirs[2].amax(0),))
        if biased:
            finite = theirs[3][0].isfinite()
            assert torch.equal(finite, ours[3].cpu().sum(0).isfinite())
            largest = torch.cat([part.flatten(1).float().abs().nan_to_num(0.0, 0.0).amax(0) for part in grads])
            error = (ours[3].cpu().sum(0) - theirs[3][0]).abs()[finite]
            assert (error <= 1e-4 * largest.amax() * tokens**0.5).all()


def test_transposed_codes_are_the_same_bytes() -> None:
    codes = encode_rows(values(384, 1536), False)[0]
    assert torch.equal(transpose_codes(codes.cuda()).cpu().view(torch.uint8), codes.view(torch.uint8).T)


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_then_codes(shape: tuple, dtype: torch.dtype, added: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    x, weight = values(*shape, dtype), torch.randn(shape[1], generator=generator).abs() + 0.5
    update = torch.randn(shape, generator=generator).to(dtype) if added else None
    codes, scale, amax, total = norm_quantize(x.cuda(), weight.cuda(), 1e-6, True, update.cuda() if added else None)
    expected = norm_quantize(x, weight, 1e-6, True, update)
    assert_same((codes, scale), expected[:2], share=2e-3)  # rstd may differ in its last bit
    assert_same((total,), expected[3:])
    assert torch.allclose(amax.amax(0).cpu(), expected[2].amax(0), rtol=1e-2, equal_nan=True)  # a bfloat16 apart


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [*SHAPES, (2000, 1536), (300, 8192)])
def test_norm_backward(shape: tuple, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(shape[0])
    wide = torch.randn(3, shape[0], shape[1] + 8, generator=generator).to(dtype)
    weight = torch.randn(shape[1], generator=generator)
    # Rows that do not touch.
    got, again = (norm_gradients(*wide.cuda()[:, :, : shape[1]], weight.cuda(), 1e-6) for _ in range(2))
    dx, parts = norm_gradients(*wide[:, :, : shape[1]], weight, 1e-6)
    last_place = 2.0**-7 if dtype == torch.bfloat16 else 1e-5
    assert torch.allclose(got[0].cpu(), dx, rtol=last_place, atol=1e-5)
    assert (got[1].cpu().sum(0) - parts.sum(0)).norm() < 1e-5 * parts.sum(0).norm()
    assert all(torch.equal(*pair) for pair in zip(got, again)), "the same bits every time"


def test_norm_backward_takes_a_gradient_that_is_one_number() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 30, 256, device="cuda").bfloat16().requires_grad_(), torch.ones(256, device="cuda")
    normed, stream = fork(x, weight, 1e-6)
    (normed * 2 + stream).sum().backward()
    ours = x.grad.clone()
    x.grad = None
    (rms_norm(x.float(), weight, 1e-6) * 2 + x.float()).sum().backward()
    assert torch.allclose(ours, x.grad, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("shape", [(512, 2048), (300, 17920), (130, 256)])
def test_swiglu_then_codes(shape: tuple, keep: bool) -> None:
    gate_up = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).bfloat16() * 3
    got, expected = swiglu_quantize(gate_up.cuda(), keep), swiglu_quantize(gate_up, keep)
    assert_same(got[:2], expected[:2], share=2e-3)
    assert_same(got[2:], expected[2:])


@pytest.mark.parametrize("amax", [True, False])
@pytest.mark.parametrize("codes", [True, False])
@pytest.mark.parametrize("shape", [(512, 2048), (300, 17920), (130, 256)])
def test_swiglu_backward_then_codes(shape: tuple, codes: bool, amax: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    gate_up = torch.randn(*shape, generator=generator).bfloat16() * 3
    grad = torch.randn(shape[0], shape[1] // 2, generator=generator).bfloat16() * 1e-3
    kept, scale = encode_rows(gate_up, False)[:2] if codes else (gate_up, gate_up.new_empty(0))
    got = swiglu_backward_quantize(grad.cuda(), kept.cuda(), scale.cuda(), amax)
    expected = swiglu_backward_quantize(grad, kept, scale, amax)
    assert_same(tuple(got[i] for i in (0, 1, 3, 4)), tuple(expected[i] for i in (0, 1, 3, 4)), share=2e-3)
    for ours, theirs in ((got[2], expected[2]), (got[5], expected[5])):
        assert torch.allclose(ours.amax(0).cpu(), theirs.amax(0), rtol=1e-4)


def test_swiglu_backward_finds_what_is_not_finite() -> None:
    """In the gradients' codes, scales and column maxima: of a whole block, and nowhere else."""
    generator = torch.Generator().manual_seed(1)
    gate_up, grad = torch.randn(300, 1024, generator=generator).bfloat16(), torch.ones(300, 512).bfloat16()
    gate_up[7, 512 + 130], gate_up[290, 3], grad[150, 400] = torch.nan, torch.inf, -torch.inf
    nothing = gate_up.new_empty(0)
    got = swiglu_backward_quantize(grad.cuda(), gate_up.cuda(), nothing.cuda(), True)
    expected = swiglu_backward_quantize(grad, gate_up, nothing, True)
    assert_same(tuple(got[i] for i in (0, 1, 3, 4)), tuple(expected[i] for i in (0, 1, 3, 4)), share=2e-3)
    for ours, theirs in (
        (got[1], expected[1]),
        (got[2].amax(0), expected[2].amax(0)),
        (got[5].amax(0), expected[5].amax(0)),
    ):
        assert torch.equal(ours.isnan().cpu(), theirs.isnan())
        assert theirs.isnan().any()
        assert not theirs.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocabulary", [1000, 8192, 151_936])
def test_softmax_gradient(vocabulary: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(37, vocabulary, generator=generator) * 4).to(dtype)
    labels = torch.randint(0, vocabulary, (37,), generator=generator)
    labels[5] = -100
    ours, theirs = logits.cuda(), logits.clone()
    nll, codes = softmax_gradient_(ours, labels.cuda(), -100, gradient=True, encode=True)
    expected, expected_codes = softmax_gradient_(theirs, labels, -100, gradient=True, encode=True)
    assert_same((codes[0][:37], codes[1][:37]), expected_codes, share=2e-3)
    assert torch.allclose(nll.cpu(), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(ours.cpu().float(), theirs.float(), rtol=1e-2, atol=1e-6)
    assert ours[5].eq(0).all()
    kept = logits.cuda()
    nll, again = softmax_gradient_(kept, labels.cuda(), -100, gradient=False, encode=True)
    assert torch.equal(kept.cpu(), logits)
    assert torch.equal(again[0].view(torch.uint8), codes[0].view(torch.uint8))
    assert torch.equal(again[1], codes[1])


def test_tiles_transposed_into_columns_of_a_wider_operand() -> None:
    parts = [quantize_rows(torch.randn(rows, 384, device="cuda"), False) for rows in (256, 128)]
    codes_t, scale_t = empty_operand(384, 384, "tile", torch.device("cuda"))
    for (codes, scale, _), start in zip(parts, (0, 256)):
        columns, blocks = slice(start, start + len(codes)), slice(start // 128, (start + len(codes)) // 128)
        transpose_tiles_into(codes, scale, codes_t[:, columns], scale_t[:, blocks])
        expected = transpose_rows(codes, scale, codes.new_empty(8, 0, dtype=torch.float32), "tile")
        assert torch.equal(codes_t[:, columns].view(torch.uint8), expected[0].view(torch.uint8))
        assert torch.equal(scale_t[:, blocks], expected[1])


def test_an_fp8_head_is_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of 256 tokens, two of them held; the last one is filled up to whole tiles."""
    monkeypatch.setattr(logit_chunks, "CHUNK_LOGITS", 256 * 1024)
    monkeypatch.setattr(cross_entropy, "HELD_CHUNKS", 2)
    torch.manual_seed(0)
    hidden, weight = torch.randn(1000, 256).bfloat16(), torch.randn(1024, 256) * 0.1
    labels = torch.randint(0, 1024, (1000,))
    labels[3] = -100
    results = []
    for device in ("cuda", "cpu"):
        x, w = hidden.to(device).requires_grad_(), weight.to(device).requires_grad_()
        loss = cross_entropy.cross_entropy_sum(x, w, labels.to(device), fp8=True)
        loss.backward()
        results.append([t.detach().cpu().double() for t in (loss, x.grad, w.grad)])
    for ours, expected in zip(*results):
        assert ((ours - expected).norm() / expected.norm()).item() < 5e-3


@pytest.mark.parametrize("given", ["both", "logprob", "entropy"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocabulary", [151_936, 8_192, 1_000])
def test_token_statistics_and_their_gradient(vocabulary: int, dtype: torch.dtype, given: str) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(37, vocabulary, generator=generator) * torch.linspace(0.1, 30, 37)[:, None]
    logits = logits.to(dtype)
    labels = torch.randint(0, vocabulary, (37,), generator=generator)
    ours = logits.cuda()
    found = token_statistics(ours, labels.cuda(), 0.7)
    exact = token_statistics(logits.double(), labels, 0.7)
    for got, expected in zip(found, exact, strict=True):
        assert torch.allclose(got.cpu().double(), expected, rtol=1e-5, atol=2e-5)
    grads = torch.randn(2, 37, generator=generator)
    grad, grad_entropy = (None if given == other else g for other, g in zip(("entropy", "logprob"), grads))
    wide = logits.double()
    token_gradient_(wide, labels, 0.7, exact[2], exact[1], grad, grad_entropy)
    token_gradient_(
        ours, labels.cuda(), 0.7, found[2], found[1], *(g if g is None else g.cuda() for g in (grad, grad_entropy))
    )
    # log p is the difference of float32 numbers as large as the largest logit or the logarithm of the vocabulary. Its
    # error, times p and the gradient, is what is left where log p and the entropy cancel.
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-4
    size = logits.double().abs().amax(dim=1, keepdim=True) / 0.7 + math.log(vocabulary)
    probs = (logits.double() / 0.7 - exact[2][:, None]).exp()
    error = (ours.cpu().double() - wide).abs()
    assert (error <= tolerance * wide.abs() + 2.0**-20 * size * probs + 1e-12).all()
    assert error.norm() < tolerance * wide.norm()


@pytest.mark.parametrize("keep", ["fp8", "bf16", "recompute"])
@pytest.mark.parametrize("recipe", ["blockwise", "hybrid"])
def test_a_model_on_the_gpu_is_the_model_on_the_cpu(recipe: str, keep: str) -> None:
    """The whole fused step, in float32 outside the GEMMs' bfloat16: loss and gradients near the CPU's."""
    results = []
    for device in ("cpu", "cuda"):
        model = CausalLM(dataclasses.replace(preset("tiny", 512), num_hidden_layers=2), torch.bfloat16)
        model.init_weights(3)
        convert(model, recipe_named(recipe), mlp_activations=keep)
        model.to(device)
        refresh_weights(model)
        ids = torch.randint(0, 512, (2, 100), generator=torch.Generator().manual_seed(1)).to(device)
        logits = model(ids, torch.arange(100, device=device).expand(2, -1), causal_attention)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
        loss.backward()
        results.append((loss.item(), {name: p.grad.cpu() for name, p in model.named_parameters()}))
    assert results[0][0] == pytest.approx(results[1][0], rel=2e-3)
    for name, gradient in results[0][1].items():
        # Attention does not change with the keys' bias: its gradient is what rounding leaves of a sum that vanishes.
        limit = 0.2 if name.endswith("k_proj.bias") else 0.08
        error = (results[1][1][name] - gradient).norm() / gradient.norm()
        assert error < limit, (name, error)


def test_norm_weight_dtype_does_not_matter() -> None:
    torch.manual_seed(0)
    x = values(64, 256)[:, :256].cuda()
    weight = torch.randn(256, device="cuda")
    got = norm_quantize(x, weight, 1e-6, False)
    assert_same(got[:2], encode_rows(rms_norm(x, weight, 1e-6), False)[:2], share=2e-3)


@pytest.mark.parametrize("recipe", ["blockwise", "hybrid"])
def test_compiled_layers_do_what_they_do_uncompiled(recipe: str) -> None:
    """At a width of six blocks: their scales are padded to eight, which compiled code must not lose."""
    config = dataclasses.replace(preset("small-150m", 512), num_hidden_layers=2, **QWEN3)
    losses = []
    for compiled in (False, True):
        model = CausalLM(config, torch.bfloat16)
        model.init_weights(3)
        convert(model, recipe_named(recipe))
        model.to("cuda")
        refresh_weights(model)
        if compiled:
            for layer in model.model.layers:
                compile_layer(layer)
        ids = torch.randint(0, 512, (2, 128), generator=torch.Generator().manual_seed(1)).cuda()
        logits = model(ids, torch.arange(128, device="cuda").expand(2, -1), causal_attention)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
        loss.backward()
        losses.append((loss.item(), model.model.layers[0].mlp.down_proj.weight.grad.norm().item()))
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
