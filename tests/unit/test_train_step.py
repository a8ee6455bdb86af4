"""One optimiser step: exact accumulation, clipping, what a non-finite number anywhere does, FP8 codes made once."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_training import (
    WORLD,
    adam,
    attention_for,
    batches,
    build,
    gradients_of,
    nan_activation,
    snapshot,
    step,
    windows,
)
from tensors import relative_error, same
from torch import Tensor, nn

from infir2.config import OptimSection
from infir2.data.packing import pack
from infir2.fp8.linear import Fp8Linear
from infir2.fp8.tensor import Operand
from infir2.model.transformer import CausalLM
from infir2.train import step as step_module
from infir2.train.optimizer import build_optimizer
from infir2.train.step import evaluate
from infir2.types import IGNORE, Batch


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_accumulation_equals_one_large_batch(micro_batch: int) -> None:
    model = build()
    made = batches(micro_batch=micro_batch)
    counts = [batch.valid_tokens for batch in made]
    assert len(set(counts)) == len(counts), "the micro-batches must differ in their number of trained-on tokens"
    result, grads = gradients_of(model, made)

    whole = pack(windows(4), True)
    logits = model(whole.input_ids, whole.position_ids, attention_for(whole))
    loss = F.cross_entropy(logits.flatten(0, 1).float(), whole.labels.flatten(), ignore_index=IGNORE)
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    assert result.valid_tokens == sum(counts) == int((whole.labels != IGNORE).sum())
    for name, parameter in model.named_parameters():
        error = relative_error(grads[name], parameter.grad)
        # A constant added to every key changes the softmax only through the rotation: what is left is mostly rounding.
        assert error < (1e-5 if name.endswith("k_proj.bias") else 1e-6), name
    norm = torch.stack([p.grad.double().square().sum() for p in model.parameters()]).sum().sqrt()
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-6)


def test_clipping_scales_the_whole_gradient() -> None:
    model = build()
    free, grads = gradients_of(model, batches())
    limited, clipped = gradients_of(model, batches(), clip=free.grad_norm / 4)
    assert limited.grad_norm == free.grad_norm, "the norm before clipping is reported"
    for name, grad in grads.items():
        torch.testing.assert_close(clipped[name], grad / 4, rtol=1e-5, atol=0.0)
    above, untouched = gradients_of(model, batches(), clip=free.grad_norm * 1.01)
    assert above.grad_norm == free.grad_norm
    assert same(untouched, grads)


def test_a_batch_without_trained_on_tokens_changes_nothing_but_decay() -> None:
    model = build()
    silent = [Batch(b.input_ids, torch.full_like(b.labels, IGNORE), b.position_ids, b.cu_seqlens, b.max_seqlen)
              for b in batches()]  # fmt: skip
    result, grads = gradients_of(model, silent)
    assert (result.loss, result.grad_norm, result.valid_tokens, result.skipped) == (0.0, 0.0, 0, False)
    assert all(not grad.any() for grad in grads.values())


# Optimiser


def test_weight_decay_groups() -> None:
    model = build()
    optimizer = build_optimizer(model, OptimSection(lr=1e-3, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, free = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert decayed | free == set(names.values())
    assert free == {name for name in names.values() if name.endswith("bias") or "norm" in name}
    assert "model.embed_tokens.weight" in decayed
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all((group["betas"], group["eps"]) == ((0.8, 0.9), 1e-6) for group in optimizer.param_groups)

    before = snapshot(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = before[name] * (1 - 1e-3 * 0.1) if name in decayed else before[name]
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0.0)


# A number that is not finite


def nan_loss(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    true = step_module.cross_entropy_sum
    monkeypatch.setattr(step_module, "cross_entropy_sum", lambda *args: true(*args) * float("nan"))


def nan_gradient(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad[0, 5, 7] = float("nan")
        return grad

    model.model.layers[1].register_forward_hook(lambda module, args, out: out.register_hook(poison) and None)


def inf_gradient(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    model.model.norm.weight.register_hook(lambda grad: grad * float("inf"))


def inf_fp8_input(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(module: nn.Module, args: Any) -> Any:
        x = args[0].clone()
        x[0, 3, 0] = float("inf")
        return (x,)

    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(poison)


def nan_fp8_gradient(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad[0, 3, 0] = float("nan")
        return grad

    model.model.layers[0].self_attn.o_proj.register_forward_hook(
        lambda module, args, out: out.register_hook(poison) and None
    )


@pytest.mark.parametrize("recipe", ["blockwise", "bf16"])
@pytest.mark.parametrize(
    "poison", [nan_loss, nan_gradient, inf_gradient, nan_activation, inf_fp8_input, nan_fp8_gradient]
)
def test_a_non_finite_number_skips_the_step(poison: Callable, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(recipe)
    optimizer = adam(model)
    assert not step(model, optimizer, batches(1)).skipped
    before = snapshot(model, optimizer)
    codes = {name: m.weight_operand().codes.float() for name, m in model.named_modules() if isinstance(m, Fp8Linear)}
    with monkeypatch.context() as patch:
        poison(model, patch)
        result = step(model, optimizer, batches(2))
    assert result.skipped
    assert not (np.isfinite(result.loss) and np.isfinite(result.grad_norm))
    assert same(snapshot(model, optimizer), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, before_codes in codes.items():
        assert torch.equal(model.get_submodule(name).weight_operand().codes.float(), before_codes)


@pytest.mark.parametrize("poison", [nan_gradient, inf_gradient, nan_fp8_gradient])
def test_a_finite_loss_does_not_hide_a_bad_gradient(poison: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("blockwise")
    poison(model, monkeypatch)
    result = step(model, adam(model), batches())
    assert np.isfinite(result.loss)
    assert result.skipped


# FP8 codes


def test_weights_are_quantised_once_an_optimiser_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("blockwise")
    assert sum(isinstance(module, Fp8Linear) for module in model.modules()) == 14
    weights = 2 * 4  # q, k and v are one operand, gate and up another
    made = 0
    quantize = Operand.quantize

    def counted(x: Tensor, granularity: str, *rest: Any) -> Operand:
        nonlocal made
        made += granularity == "block"
        return quantize(x, granularity, *rest)

    monkeypatch.setattr(Operand, "quantize", counted)
    optimizer = adam(model)
    counts = []
    for n in range(3):
        step(model, optimizer, batches(n, micro_batch=1))  # four micro-batches
        counts.append(made)
    assert counts == [weights, 2 * weights, 3 * weights]
    evaluate(model, batches(), WORLD, attention_for)
    evaluate(model, batches(), WORLD, attention_for)
    step(model, optimizer, batches())
    assert made == 4 * weights, "an evaluation uses the codes that the next step uses"
    with monkeypatch.context() as patch:
        nan_loss(model, patch)
        assert step(model, optimizer, batches()).skipped
    assert made == 4 * weights, "a skipped step leaves the codes as they are"


# Evaluation


@pytest.mark.parametrize("recipe", ["blockwise", "bf16"])
def test_evaluation_only_looks(recipe: str) -> None:
    model = build(recipe)
    optimizer = adam(model)
    step(model, optimizer, batches())
    before, rng = snapshot(model, optimizer), torch.get_rng_state()
    loss = evaluate(model, batches(5), WORLD, attention_for)
    assert same(snapshot(model, optimizer), before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())

    total = count = 0
    with torch.no_grad():
        for batch in batches(5):
            logits = model(batch.input_ids, batch.position_ids, attention_for(batch)).flatten(0, 1)
            total += F.cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORE, reduction="sum").item()
            count += batch.valid_tokens
    assert loss == pytest.approx(total / count, rel=1e-6)


def test_an_error_in_evaluation_leaves_training_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()

    def broken() -> Iterator[Batch]:
        yield batches()[0]
        raise OSError("the disk has gone")

    with pytest.raises(OSError, match="gone"):
        evaluate(model, broken(), WORLD, attention_for)
    assert model.training


# The loop
