"""How replicas add up their gradients, without other processes: what is sent, and where the sums end up."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_training import adam, attention_for, batches, build, snapshot
from torch import Tensor, nn

from infir2.parallel import apply
from infir2.parallel.apply import sum_gradients
from infir2.parallel.runtime import World
from infir2.train.graphs import can_record
from infir2.train.step import train_step

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHARDED: Any = object()  # a mesh, as far as it is looked at here


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What is given to an all-reduce over three processes with equal gradients."""
    tensors: list[Tensor] = []

    def all_reduce(tensor: Tensor) -> None:
        tensors.append(tensor)
        tensor.mul_(3)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(apply, "_BUCKET", 40)
    return tensors


def model_with_gradients() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 20), nn.Linear(20, 2), nn.Linear(2, 7), nn.Linear(7, 6))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def test_sums_lie_where_the_gradients_lay_and_go_in_few_calls(sent: list[Tensor]) -> None:
    model = model_with_gradients()
    before = [(p.grad, p.grad.clone()) for p in model.parameters() if p.grad is not None]
    sum_gradients(model, World(0, 3, CPU, None))
    for parameter, (place, value) in zip(model.parameters(), before, strict=True):
        assert parameter.grad is place
        assert torch.equal(place, 3 * value)
    # 20 x 3, 2 x 20 and 6 x 7 alone, as they lie; 12 + 3 + 20 + 2 + 14 together, then 7 + 6.
    assert [tensor.numel() for tensor in sent] == [60, 40, 51, 42, 13]
    assert sum(any(tensor is place for place, _ in before) for tensor in sent) == 3


def test_a_missing_gradient_counts_as_zeros_and_a_frozen_parameter_has_none(sent: list[Tensor]) -> None:
    model = model_with_gradients()
    missing, frozen = model[0].weight, model[3].weight
    missing.grad = frozen.grad = None
    frozen.requires_grad_(False)
    sum_gradients(model, World(0, 3, CPU, None))
    assert torch.equal(missing.grad, torch.zeros(3, 4))
    assert frozen.grad is None
    assert sum(tensor.numel() for tensor in sent) == sum(p.numel() for p in model.parameters()) - 14


def test_replicas_with_the_same_data_step_like_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them: a loss over twice as many tokens, and twice its gradient. Powers of two round nothing."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(2))
    found = []
    for size in (1, 2):
        model = build("blockwise", torch.bfloat16)
        optimizer = adam(model)
        results = [
            train_step(model, optimizer, batches(seed), World(0, size, CPU, None), attention_for, clip=0.5)
            for seed in range(3)
        ]
        found.append(([(r.loss, r.grad_norm) for r in results if r], snapshot(model, optimizer)))
    (ours, one), (theirs, two) = found
    assert ours == theirs
    assert len(ours) == 3
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("world", [World(0, 1, CPU, None), World(0, 4, CPU, SHARDED)])
def test_nothing_is_sent_by_a_single_process_or_what_is_sharded(sent: list[Tensor], world: World) -> None:
    sum_gradients(model_with_gradients(), world)
    assert sent == []


def test_graphs_are_for_gpus_that_hold_the_whole_model() -> None:
    assert can_record(World(0, 1, GPU, None))
    assert can_record(World(3, 4, GPU, None))
    assert not can_record(World(0, 4, GPU, SHARDED))
    assert not can_record(World(0, 1, CPU, None))
