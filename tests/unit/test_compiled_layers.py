"""Compiled layers: in one piece at any shape, and keeping for the backward pass what the recipe says, and no more."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from infir2.fp8.convert import convert, refresh_weights
from infir2.fp8.recipe import recipe_named
from infir2.model.attention import causal_attention
from infir2.model.presets import preset
from infir2.model.transformer import CausalLM

TOKENS = 64


def kept(recipe: str, mlp_activations: Any) -> list[Tensor]:
    """What one compiled layer keeps, compiled without code generation: the partitioner is what decides."""
    torch._dynamo.reset()
    config = dataclasses.replace(preset("tiny", 256), num_hidden_layers=1)
    model = CausalLM(config, torch.float32)
    model.init_weights(3)
    convert(model, recipe_named(recipe), mlp_activations=mlp_activations)
    refresh_weights(model)
    layer = torch.compile(model.model.layers[0], backend="aot_eager_decomp_partition")
    cos, sin = model.model.rotary(torch.arange(TOKENS)[None])
    hidden = torch.randn(1, TOKENS, config.hidden_size, requires_grad=True)
    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        layer(hidden, cos, sin, causal_attention)
    return found


@pytest.mark.parametrize(
    ("keep", "dtypes"), [("fp8", {torch.float8_e4m3fn}), ("bf16", {torch.float32}), ("recompute", set())]
)
def test_gate_and_up_are_kept_as_asked(keep: str, dtypes: set[torch.dtype]) -> None:
    inner = preset("tiny", 256).intermediate_size
    wide = [t for t in kept("blockwise", keep) if t.numel() >= TOKENS * inner and t.shape[0] == TOKENS]
    assert {t.dtype for t in wide} == dtypes


@pytest.mark.parametrize("recipe", ["bf16", "blockwise", "hybrid"])
def test_a_layer_is_compiled_in_one_piece_at_any_shape(recipe: str) -> None:
    torch._dynamo.reset()
    model = CausalLM(dataclasses.replace(preset("tiny", 256), num_hidden_layers=1), torch.float32)
    model.init_weights(3)
    convert(model, recipe_named(recipe))
    refresh_weights(model)
    model.model.layers[0].compile(backend="aot_eager", fullgraph=True)
    for rows, length in ((1, 256), (2, 128), (3, 64), (2, 100)):
        ids = torch.randint(0, 256, (rows, length))
        model(ids, torch.arange(length).expand(rows, -1), causal_attention).sum().backward()
