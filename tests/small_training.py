"""Small models, batches and gradients for the tests of the training step and loop."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from small_run import ARCHITECTURE, SEQ_LEN, VOCAB
from torch import Tensor, nn

from infir2.config import OptimSection
from infir2.data.packing import Window, pack
from infir2.fp8.convert import convert, refresh_weights
from infir2.fp8.recipe import recipe_named
from infir2.model.attention import document_attention
from infir2.model.transformer import CausalLM
from infir2.parallel.runtime import World
from infir2.train.optimizer import build_optimizer
from infir2.train.step import StepResult, train_step
from infir2.types import Batch

WORLD = World(0, 1, torch.device("cpu"), None)
NO_CLIP = 0.0


def build(recipe: str = "bf16", dtype: torch.dtype = torch.float32) -> CausalLM:
    model = CausalLM(ARCHITECTURE, dtype)
    model.init_weights(3)
    convert(model, recipe_named(recipe))
    refresh_weights(model)
    return model


def windows(count: int, seed: int = 0) -> list[Window]:
    """Sequences with 0 to 40 documents each, so the numbers of trained-on tokens differ a lot."""
    rng = np.random.default_rng(seed)
    starts = [np.sort(rng.choice(np.arange(1, SEQ_LEN), 40 * i // count, replace=False)) for i in range(count)]
    return [Window(rng.integers(0, VOCAB, SEQ_LEN + 1), start) for start in starts]


def batches(seed: int = 0, micro_batch: int = 2) -> list[Batch]:
    made = windows(4, seed)
    return [pack(made[i : i + micro_batch], True) for i in range(0, 4, micro_batch)]


def attention_for(batch: Batch) -> Callable:
    return document_attention(batch, torch.float32)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, made: Sequence[Batch], clip: float = 1.0) -> StepResult:
    return train_step(model, optimizer, made, WORLD, attention_for, clip)


def adam(model: nn.Module) -> torch.optim.AdamW:
    return build_optimizer(model, OptimSection(lr=1e-3))


def gradients_of(
    model: nn.Module, made: Sequence[Batch], clip: float = NO_CLIP
) -> tuple[StepResult, dict[str, Tensor]]:
    """What a step gives the optimiser."""
    seen: dict[str, Tensor] = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(
        lambda *_: seen.update({name: p.grad.clone() for name, p in model.named_parameters()})
    )
    return step(model, optimizer, made, clip), seen


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    for index, (_, values) in enumerate(optimizer.state.items()):
        state |= {f"{index}.{key}": value.clone() for key, value in values.items()}
    return state


def nan_activation(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[0, 3, 0] = float("nan")
        return out

    model.model.layers[0].register_forward_hook(poison)
