"""What of a layer is compiled, how often, and what a layer keeps for its backward pass."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from infir2.fp8.convert import convert, refresh_weights
from infir2.fp8.recipe import recipe_named
from infir2.model.attention import Implementation, causal_attention, document_attention
from infir2.model.presets import preset
from infir2.model.transformer import CausalLM
from infir2.parallel.apply import compile_layer
from infir2.types import Batch

TOKENS = 64
QWEN3: Any = {"model_type": "qwen3", "qk_norm": True, "qkv_bias": False}


def kept(recipe: str, mlp_activations: Any) -> list[Tensor]:
    """What one layer keeps."""
    model = CausalLM(dataclasses.replace(preset("tiny", 256), num_hidden_layers=1), torch.float32)
    model.init_weights(3)
    convert(model, recipe_named(recipe), mlp_activations=mlp_activations)
    refresh_weights(model)
    cos, sin = model.model.rotary(torch.arange(TOKENS)[None])
    hidden = torch.randn(1, TOKENS, model.config.hidden_size, requires_grad=True)
    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        model.model.layers[0](hidden, cos, sin, causal_attention)
    return found


@pytest.mark.parametrize(
    ("keep", "dtypes"), [("fp8", {torch.float8_e4m3fn}), ("bf16", {torch.float32}), ("recompute", set())]
)
def test_gate_and_up_are_kept_as_asked(keep: str, dtypes: set[torch.dtype]) -> None:
    inner = preset("tiny", 256).intermediate_size
    wide = [t for t in kept("blockwise", keep) if t.numel() >= TOKENS * inner and t.shape[0] == TOKENS]
    assert {t.dtype for t in wide} == dtypes


def compiled(recipe: str, qk_norm: bool = False) -> tuple[CausalLM, CompileCounter]:
    """A model whose one layer is compiled by a backend that counts the graphs it is given."""
    torch._dynamo.reset()
    config = dataclasses.replace(preset("tiny", 256), num_hidden_layers=1, **(QWEN3 if qk_norm else {}))
    model = CausalLM(config, torch.float32)
    model.init_weights(3)
    convert(model, recipe_named(recipe))
    refresh_weights(model)
    counter = CompileCounter()
    compile_layer(model.model.layers[0], counter)
    return model, counter


@pytest.mark.parametrize(
    ("recipe", "qk_norm", "pieces"),
    [("bf16", False, 2), ("rowwise", False, 2), ("hybrid", True, 1), ("hybrid", False, 0), ("blockwise", False, 0)],
)
def test_what_is_not_a_kernel_already_is_compiled_for_any_shape(recipe: str, qk_norm: bool, pieces: int) -> None:
    """Each piece whole: at first for one shape, then for all."""
    model, counter = compiled(recipe, qk_norm)
    for rows, length in ((1, 256), (2, 128), (3, 64), (2, 100)):
        ids = torch.randint(0, 256, (rows, length))
        model(ids, torch.arange(length).expand(rows, -1), causal_attention).sum().backward()
    assert counter.frame_count == 2 * pieces


@pytest.mark.parametrize("implementation", ["auto", "mask"])
def test_another_packing_compiles_nothing(implementation: Implementation) -> None:
    """Ranks meet packed and unpacked micro-batches at different steps: each would wait for all others' compilers."""
    model, counter = compiled("bf16")
    ids = torch.randint(0, 256, (2, 64))
    for ends in ([0, 64, 128], [0, 5, 64, 128], [0, 1, 2, 9, 64, 128]):
        cu_seqlens = torch.tensor(ends, dtype=torch.int32)
        positions = torch.cat([torch.arange(n) for n in cu_seqlens.diff().tolist()]).view_as(ids)
        batch = Batch(ids, ids, positions, cu_seqlens, int(cu_seqlens.diff().max()))
        model(ids, positions, document_attention(batch, torch.float32, implementation)).sum().backward()
    assert counter.frame_count == 2, "before attention and after it"
