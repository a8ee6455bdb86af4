"""A decoding round's fused pass against the model's own forward pass: the same bits."""

import dataclasses

import pytest
import torch
from small_engine import ARCHITECTURE, FP8_ARCHITECTURE, flat, make_model, mixed_requests
from torch import Tensor

from infir2.fp8.convert import convert, refresh_weights
from infir2.fp8.recipe import recipe_named
from infir2.kernels.paged_layout import PagedCache, PagedLayout, empty_cache
from infir2.kernels.reference import FP8
from infir2.model.config import ModelConfig
from infir2.model.transformer import CausalLM
from infir2.rollout.engine import Engine
from infir2.rollout.fused_decode import FusedDecode
from infir2.rollout.options import EngineOptions
from infir2.rollout.runner import PagedAttention

BLOCK = 16
LENGTHS = [1, 9, 16, 17, 40]  # contexts with the new token
FAMILIES = {
    "qwen2": {},
    "qwen3": {"model_type": "qwen3", "qkv_bias": False, "qk_norm": True},
    "llama": {"model_type": "llama", "qkv_bias": False},
}


def caches_for(config: ModelConfig, dtype: torch.dtype) -> list[PagedCache]:
    """With contexts that somebody else wrote."""
    generator = torch.Generator().manual_seed(5)
    caches = []
    for _ in range(config.num_hidden_layers):
        cache = empty_cache(16, BLOCK, config.num_key_value_heads, config.head_dim, dtype, "cpu")
        for pool in (cache.keys, cache.values):
            pool.copy_(torch.randn(pool.shape, generator=generator).to(dtype))
        for scale in (cache.key_scale, cache.value_scale):
            if scale is not None:
                scale.fill_(0.5)
        caches.append(cache)
    return caches


def layout() -> PagedLayout:
    count = len(LENGTHS)
    tables = torch.arange(3 * count, dtype=torch.int32).view(count, 3)
    slots = [int(tables[i, (n - 1) // BLOCK]) * BLOCK + (n - 1) % BLOCK for i, n in enumerate(LENGTHS)]
    contexts = torch.tensor(LENGTHS, dtype=torch.int32)
    starts, no_tiles = torch.arange(count + 1, dtype=torch.int32), torch.zeros(0, 2, dtype=torch.int32)
    return PagedLayout(torch.tensor(slots), starts, contexts, tables, no_tiles, count)


@torch.no_grad()
def assert_same_bits(model: CausalLM, cache_dtype: torch.dtype) -> None:
    model.cast_weights()
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        for name, parameter in model.named_parameters():  # as they are after initialisation nobody would miss them
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    refresh_weights(model)
    model.cast_weights()
    ids = torch.randint(0, model.config.vocab_size, (len(LENGTHS),), generator=generator)
    positions = torch.tensor(LENGTHS) - 1
    theirs, ours = caches_for(model.config, cache_dtype), caches_for(model.config, cache_dtype)

    def hidden_states(hidden: Tensor, weight: Tensor) -> Tensor:
        return hidden[0]

    expected = model(ids[None], positions[None], PagedAttention(theirs, layout()), hidden_states)
    assert FusedDecode.fits(model)
    got = FusedDecode(model)(ids, positions, ours, layout())
    assert torch.equal(got, expected)
    for a, b in zip(ours, theirs):
        assert torch.equal(a.keys.view(torch.uint8), b.keys.view(torch.uint8))
        assert torch.equal(a.values.view(torch.uint8), b.values.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_layers(family: str, dtype: torch.dtype) -> None:
    assert_same_bits(make_model(dataclasses.replace(ARCHITECTURE, **FAMILIES[family]), dtype=dtype), dtype)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_layers(family: str, cache_dtype: torch.dtype) -> None:
    model = make_model(dataclasses.replace(FP8_ARCHITECTURE, **FAMILIES[family]), dtype=torch.bfloat16)
    assert convert(model, recipe_named("blockwise")).fused
    assert_same_bits(model, cache_dtype)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "hybrid"])
def test_other_recipes(recipe: str) -> None:
    model = make_model(FP8_ARCHITECTURE, dtype=torch.bfloat16)
    convert(model, recipe_named(recipe))
    assert_same_bits(model, torch.bfloat16)


def test_a_first_layer_in_bf16() -> None:
    model = make_model(FP8_ARCHITECTURE, dtype=torch.bfloat16)
    convert(model, recipe_named("blockwise"), keep={"model.layers.0.": "kept"})
    assert_same_bits(model, torch.bfloat16)


def test_what_does_not_fit_is_left_to_the_model() -> None:
    """An output projection in bf16 behind fused FP8 projections: the engine's rounds are the model's own passes."""
    model = make_model(FP8_ARCHITECTURE, dtype=torch.bfloat16)
    names = [f"model.layers.{i}.self_attn.o_proj." for i in range(FP8_ARCHITECTURE.num_hidden_layers)]
    convert(model, recipe_named("blockwise"), keep=dict.fromkeys(names, "kept"))
    assert not FusedDecode.fits(model)
    requests = mixed_requests(6)
    rounds, plain = (flat(Engine(model, options=EngineOptions(decode_rounds=n)).generate(requests)) for n in (4, 1))
    assert [c.token_ids for c in rounds] == [c.token_ids for c in plain]


def test_rounds_of_an_engine_take_it() -> None:
    model = make_model(FP8_ARCHITECTURE, dtype=torch.bfloat16)
    convert(model, recipe_named("blockwise"))
    requests = mixed_requests(10)
    rounds, plain = (flat(Engine(model, options=EngineOptions(decode_rounds=n)).generate(requests)) for n in (8, 1))
    assert [c.token_ids for c in rounds] == [c.token_ids for c in plain]
    assert [c.logprobs for c in rounds] == [pytest.approx(c.logprobs, abs=1e-5) for c in plain]
