"""Compiled layers: in one piece at any shape, and keeping for the backward pass what the recipe says, and no more."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from infir2.fp8.convert import convert, refresh_weights
from infir2.fp8.recipe import recipe_named
from infir2.model.attention import causal_attention, document_attention
from infir2.model.presets import preset
from infir2.model.transformer import CausalLM
from infir2.parallel.apply import compile_layer
from infir2.types import Batch

TOKENS = 64


def kept(recipe: str, mlp_activations: Any) -> list[Tensor]:
    """What one compiled layer keeps, compiled without code generation: the partitioner is what decides."""
    torch._dynamo.reset()
    config = dataclasses.replace(preset("tiny", 256), num_hidden_layers=1)
    model = CausalLM(config, torch.float32)
    model.init_weights(3)
    convert(model, recipe_named(recipe), mlp_activations=mlp_activations)
    refresh_weights(model)
    layer = model.model.layers[0]
    compile_layer(layer, "aot_eager_decomp_partition")
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


def model_of(recipe: str) -> tuple[CausalLM, CompileCounter]:
    """One layer, compiled by a backend that counts the graphs it is given."""
    torch._dynamo.reset()
    model = CausalLM(dataclasses.replace(preset("tiny", 256), num_hidden_layers=1), torch.float32)
    model.init_weights(3)
    convert(model, recipe_named(recipe))
    refresh_weights(model)
    counter = CompileCounter()
    compile_layer(model.model.layers[0], counter)
    return model, counter


@pytest.mark.parametrize("recipe", ["bf16", "blockwise", "hybrid"])
def test_a_layer_is_compiled_in_two_pieces_at_any_shape(recipe: str) -> None:
    model, counter = model_of(recipe)
    for rows, length in ((1, 256), (2, 128), (3, 64), (2, 100)):
        ids = torch.randint(0, 256, (rows, length))
        model(ids, torch.arange(length).expand(rows, -1), causal_attention).sum().backward()
    assert counter.frame_count == 4, "before and after attention, at first of one shape, then of any"


@pytest.mark.parametrize("recipe", ["bf16", "hybrid"])
def test_another_packing_compiles_nothing(recipe: str) -> None:
    """Ranks meet packed and unpacked micro-batches at different steps: each would wait for all others' compilers."""
    model, counter = model_of(recipe)
    ids = torch.randint(0, 256, (2, 64))
    for ends in ([0, 64, 128], [0, 5, 64, 128], [0, 1, 2, 9, 64, 128]):
        cu_seqlens = torch.tensor(ends, dtype=torch.int32)
        positions = torch.cat([torch.arange(n) for n in cu_seqlens.diff().tolist()]).view_as(ids)
        batch = Batch(ids, ids, positions, cu_seqlens, int(cu_seqlens.diff().max()))
        for implementation in ("auto", "mask"):
            model(ids, positions, document_attention(batch, torch.float32, implementation)).sum().backward()
    assert counter.frame_count == 2
