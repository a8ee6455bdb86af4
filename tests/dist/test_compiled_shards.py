"""Compiled layers of a sharded FP8 model: weights are quantised when they are gathered, outside of what is compiled."""

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from infir2.fp8.convert import convert, refresh_stale, refresh_weights
from infir2.fp8.linear import Fp8Linear
from infir2.fp8.recipe import recipe_named
from infir2.fp8.tensor import Operand
from infir2.model.attention import causal_attention
from infir2.model.presets import preset
from infir2.model.transformer import CausalLM
from infir2.parallel.apply import Checkpointing, parallelize
from infir2.parallel.runtime import World


@pytest.fixture
def world() -> Iterator[World]:
    """One process that shards as several do."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, torch.device("cpu"), init_device_mesh("cpu", (1,), mesh_dim_names=("shard",)))
    dist.destroy_process_group()


@pytest.mark.parametrize("checkpointing", ["none", "attention", "full"])
def test_new_weights_make_new_codes_and_no_new_graphs(
    world: World, checkpointing: Checkpointing, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = []

    def counted(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled(function, backend=counted))
    torch._dynamo.reset()
    torch.manual_seed(0)
    # Norms of queries and keys are no part of the fused kernels: what comes before attention is compiled.
    model = CausalLM(
        dataclasses.replace(preset("micro", 512), model_type="qwen3", qk_norm=True, qkv_bias=False), torch.float32
    )
    convert(model, recipe_named("hybrid"))
    parallelize(
        model, model.model.layers, world,
        activation_checkpointing=checkpointing, compile_layers=True, when_gathered=refresh_stale,
    )  # fmt: skip
    ids = torch.arange(64)[None]
    found = []
    for _ in range(4):
        refresh_weights(model)
        for _ in range(2):  # micro-batches
            model(ids, ids, causal_attention).square().mean().backward()
        found.append(len(graphs))
        for layer in (module for module in model.modules() if isinstance(module, Fp8Linear)):
            assert isinstance(layer.weight, DTensor)
            expected = Operand.quantize(layer.weight.full_tensor().bfloat16(), "block", "ue8m0")
            assert torch.equal(layer.weight_operand().codes.view(torch.uint8), expected.codes.view(torch.uint8))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-1.25)
    assert found[0] > 0
    assert found[1:] == found[:-1], "compiled again where nothing but weights had changed"
