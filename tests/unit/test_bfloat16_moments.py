"""AdamW with bfloat16 moments: its step, its rounding, and its state in checkpoints, resumes and decay runs."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_cpt import cpt, error_of, interrupt_at
from small_run import loss_bits, metrics_lines
from small_training import batches, build, snapshot, step
from tensors import same
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from infir2.checkpoint.state import optimizer_state
from infir2.config import OptimSection
from infir2.fp8.convert import refresh_weights
from infir2.kernels.adamw import Update, adamw_
from infir2.kernels.rounding import random_bits, round_to_bfloat16
from infir2.train.bfloat16_moments import Bfloat16MomentsAdamW, first_row
from infir2.train.optimizer import build_optimizer

Recipe = Callable[..., tuple[Path, Path]]
BFLOAT16 = {"optim.moments": "bfloat16"}


def optimizer_of(model: nn.Module, moments: str = "bfloat16") -> torch.optim.AdamW:
    return build_optimizer(model, OptimSection.model_validate({"lr": 1e-3, "moments": moments}))


# One step


def test_a_step_is_adamw_of_what_is_stored() -> None:
    """From one stored state, against float64: float32's rounding is all that separates the new weights."""
    torch.manual_seed(0)
    parameter, grad = torch.randn(40, 33), torch.randn(40, 33) * 1e-3
    mean, square = (torch.randn(40, 33) * 1e-3).bfloat16(), (torch.rand(40, 33) * 1e-6).bfloat16()
    p, m, v, g = (t.double() for t in (parameter, mean, square, grad))
    m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
    p = p * (1 - 1e-3 * 0.1) - 1e-3 * (m / (1 - 0.9**7)) / ((v / (1 - 0.95**7)).sqrt() + 1e-8)
    adamw_(parameter, grad, mean, square, Update.of(1e-3, (0.9, 0.95), 1e-8, 0.1, 7, 0), 0)
    torch.testing.assert_close(parameter.double(), p, rtol=1e-6, atol=1e-8)
    for rounded, exact in ((mean, m), (square, v)):
        assert rounded.dtype == torch.bfloat16
        assert (rounded.double() / exact - 1).abs().max() <= 2**-7, "one of the two neighbours"


def test_the_optimizer_is_near_torchs() -> None:
    """The first step has no rounded moments to start from: the weights are torch's but for float32's rounding."""
    models = [build("blockwise") for _ in range(2)]
    for model, moments in zip(models, ("float32", "bfloat16")):
        step(model, optimizer_of(model, moments), batches())
    for ours, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_the_state_has_torchs_names() -> None:
    model = build()
    optimizer = optimizer_of(model)
    step(model, optimizer, batches())
    names = dict(model.named_parameters())
    state = optimizer_state(model, optimizer)
    assert state.keys() == names.keys()
    for name, values in state.items():
        assert {key: value.dtype for key, value in values.items()} == {
            "step": torch.float32,
            "exp_avg": torch.bfloat16,
            "exp_avg_sq": torch.bfloat16,
        }
        assert values["exp_avg"].shape == names[name].shape
        assert values["step"] == 1


def test_a_parameter_without_gradient_stays_and_does_not_age() -> None:
    model = build()
    optimizer = optimizer_of(model)
    before = model.model.norm.weight.detach().clone()
    loss = model(torch.zeros(1, 4, dtype=torch.int64), torch.arange(4)[None], lambda q, k, v, index: q)
    loss.float().sum().backward()
    model.model.norm.weight.grad = None
    optimizer.step()
    assert torch.equal(model.model.norm.weight, before)
    assert optimizer.state[model.model.norm.weight]["step"] == 0


# Rounding


def test_rounding_is_to_a_neighbour_and_right_on_average() -> None:
    torch.manual_seed(0)
    values = torch.cat([torch.randn(50), torch.rand(50) * 1e-38, torch.tensor([0.0, 1.0, -2.0, 1e38])])
    noise = random_bits(torch.empty(4096, len(values)), key=123, first=0)
    rounded = torch.stack([round_to_bfloat16(values, bits) for bits in noise & 0xFFFF]).double()
    exact = values.double()
    ulp = 2.0 ** (exact.abs().clamp(min=2.0**-126).log2().floor() - 7)
    assert ((rounded - exact).abs() < ulp).all()
    kept = values == values.bfloat16()
    assert (rounded[:, kept] == exact[kept]).all(), "what bfloat16 can hold is left alone"
    assert ((rounded.mean(0) - exact).abs() / ulp).max() < 5 * 0.5 / 4096**0.5
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert torch.equal(round_to_bfloat16(odd, torch.full((3,), 0xFFFF)).nan_to_num(7.0), odd.bfloat16().nan_to_num(7.0))


def test_noise_differs_by_step_parameter_and_element() -> None:
    def noise(step: int, number: int) -> Tensor:
        return random_bits(torch.empty(1000), Update.of(1e-3, (0.9, 0.95), 1e-8, 0.0, step, number).key, 0)

    both = torch.stack([noise(step, number) for step in range(1, 9) for number in range(8)]).double() / 2**32
    assert (both.mean() - 0.5).abs() < 0.005
    correlation = torch.corrcoef(both)
    assert (correlation - torch.eye(64)).abs().max() < 0.15


def test_a_shard_rounds_like_the_whole() -> None:
    torch.manual_seed(0)
    update = Update.of(1e-3, (0.9, 0.95), 1e-8, 0.1, 3, 5)
    whole = [torch.randn(7, 5), torch.randn(7, 5), torch.randn(7, 5).bfloat16(), torch.rand(7, 5).bfloat16()]
    parts = [[t.clone() for t in chunks] for chunks in zip(*(t.chunk(3) for t in whole))]
    adamw_(*whole, update, 0)
    for index, part in enumerate(parts):
        adamw_(*part, update, first_row(7, 3, index) * 5)
    for number, tensor in enumerate(whole):
        assert torch.equal(torch.cat([part[number] for part in parts]), tensor)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9])
def test_rows_are_cut_as_torch_cuts_them(rows: int, parts: int) -> None:
    chunks = torch.arange(rows).chunk(parts)
    firsts = [int(chunk[0]) for chunk in chunks]
    assert [first_row(rows, parts, part) for part in range(parts)] == firsts + [rows] * (parts - len(firsts))


def second_moments(
    gradient: Callable[[int], Tensor], beta2: float, rounding: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """exp_avg_sq after 600 steps over what float64 arithmetic makes of it."""
    stored, exact = torch.zeros(4096), torch.zeros(4096, dtype=torch.float64)
    for t in range(1, 601):
        square = gradient(t).square()
        stored = rounding(stored * beta2 + square * (1 - beta2), t)
        exact = exact * beta2 + square.double() * (1 - beta2)
    return stored.double() / exact


def to_nearest(x: Tensor, t: int) -> Tensor:
    return x.bfloat16().float()


def stochastic(x: Tensor, t: int) -> Tensor:
    return round_to_bfloat16(x, random_bits(x, Update.of(1.0, (0.9, 0.9), 1.0, 0.0, t, 0).key, 0) & 0xFFFF).float()


@pytest.mark.parametrize("beta2", [0.95, 0.98, 0.999])
@pytest.mark.parametrize("kind", ["noise", "steady", "fading"])
def test_why_rounding_is_stochastic(kind: str, beta2: float) -> None:
    """Rounded to nearest, steady gradients leave exp_avg_sq 5 % short with beta2 = 0.95, 12 % with 0.98, 40 % with
    0.999, and with the last even fading noise is forgotten too slowly. Stochastic rounding is right on average."""
    generator = torch.Generator().manual_seed(0)
    steady = torch.linspace(0.5, 2.0, 4096)
    gradient = {
        "noise": lambda t: torch.randn(4096, generator=generator),
        "steady": lambda t: steady,
        "fading": lambda t: torch.randn(4096, generator=generator) * 0.99**t,
    }[kind]
    ours = second_moments(gradient, beta2, stochastic)
    assert ours.mean() == pytest.approx(1.0, abs=3e-3)
    assert ours.std() < 0.06
    nearest = second_moments(gradient, beta2, to_nearest).mean()
    if kind == "steady":
        assert nearest < {0.95: 0.96, 0.98: 0.89, 0.999: 0.62}[beta2]
    if kind == "fading" and beta2 == 0.999:
        assert nearest > 1.4


def test_hundreds_of_steps_stay_with_float32_moments() -> None:
    """A noisy quadratic in 2,000 dimensions: where torch's AdamW ends, ours does, both far below the start."""
    torch.manual_seed(0)
    curvature, start = torch.logspace(-2, 1, 2000), torch.randn(2000)
    ends = []
    for kind in (torch.optim.AdamW, Bfloat16MomentsAdamW):
        generator = torch.Generator().manual_seed(1)
        x = nn.Parameter(start.clone())
        optimizer = kind([x], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
        for n in range(400):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - n / 400)
            x.grad = curvature * (x.detach() + 0.3 * torch.randn(2000, generator=generator))
            optimizer.step()
        ends.append((0.5 * curvature * x.detach().square()).sum().item())
    assert ends[1] == pytest.approx(ends[0], rel=2e-2)
    assert ends[0] < 0.05 * (0.5 * curvature * start.square()).sum()


# State


def trained(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build("blockwise")
    optimizer = optimizer_of(model)
    for n in range(steps):
        step(model, optimizer, batches(n))
    return model, optimizer


@pytest.mark.parametrize("way", ["load_state_dict", "dcp"])
def test_a_saved_state_goes_on_with_the_same_bits(way: str) -> None:
    model, optimizer = trained(3)
    other = build("blockwise")
    other.load_state_dict(model.state_dict())
    refresh_weights(other)
    fresh = optimizer_of(other)
    if way == "dcp":
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
        assert saved["state"]["model.norm.weight"]["exp_avg"].dtype == torch.bfloat16
        set_optimizer_state_dict(other, fresh, saved)
    else:
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch would share the step counts
    assert same(snapshot(other, fresh), snapshot(model, optimizer))
    assert all(value["exp_avg_sq"].dtype == torch.bfloat16 for value in fresh.state.values())
    for one, its in ((model, optimizer), (other, fresh)):
        one.zero_grad()
        step(one, its, batches(9))
    assert same(snapshot(other, fresh), snapshot(model, optimizer))


def test_a_killed_run_resumes_with_the_same_bits(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, expected = recipe("whole", **BFLOAT16)
    assert cpt(whole) == 0
    path, run = recipe("killed", **BFLOAT16)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7)
        assert cpt(path) == 130
    assert cpt(path) == 0
    assert loss_bits(run) == loss_bits(expected)
    meta = json.loads((run / "checkpoints/step-000008/meta.json").read_text())
    assert meta["config"]["optim"]["moments"] == "bfloat16"


def test_other_moments_are_another_recipe_but_can_be_taken_over(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stable run with float32 moments; from its checkpoint, decay runs that keep them as they are, or rounded."""
    settings = {"train.eval_every": 0, "optim.decay_steps": 0}
    stable, run = recipe("stable", **settings, **{"train.steps": 4})
    assert cpt(stable) == 0
    assert "optim.moments: float32 -> bfloat16" in error_of(capsys, stable, "--optim.moments", "bfloat16")
    decay: dict[str, Any] = {"optim.warmup_steps": 0, "optim.decay_steps": 4, "train.steps": 4}
    losses = []
    for moments in ("float32", "bfloat16"):
        start = {"init.checkpoint": str(run / "checkpoints/step-000004"), "optim.moments": moments}
        path, there = recipe(moments, **settings | decay | start)
        assert cpt(path) == 0
        losses.append([line["loss"] for line in metrics_lines(there)])
    assert losses[0][0] == losses[1][0]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert losses[0] != losses[1]

    changed = ("--train.steps", "6", "--train.accept_changes", "true", "--optim.moments", "bfloat16")
    assert cpt(stable, *changed) == 0, "the run itself can go on with rounded moments"
