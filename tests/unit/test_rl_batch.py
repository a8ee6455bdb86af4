"""Samples on their way to the trainer, weights on their way to the engine."""

import copy
import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest
import small_rl
import torch
from small_rl import toy_samples
from small_training import attention_for

from infir2.config import PolicySection
from infir2.fp8.convert import convert, refresh_weights
from infir2.fp8.linear import Fp8Linear
from infir2.fp8.recipe import recipe_named
from infir2.model.transformer import CausalLM
from infir2.rl.batch import TrainingSample, pack_samples, split_samples, with_logprobs
from infir2.rl.objective import PolicyObjective, batch_logprobs
from infir2.rl.weight_sync import sync_weights
from infir2.rollout.engine import Engine
from infir2.rollout.interface import Capabilities
from infir2.rollout.options import EngineOptions
from infir2.rollout.records import Request, SamplingParams
from infir2.train.optimizer import build_optimizer
from infir2.train.step import StepResult, train_step
from infir2.types import IGNORE

TEMPERATURE = 1.2


def build(recipe: str = "bf16", dtype: torch.dtype = torch.float32, seed: int = 3) -> CausalLM:
    model = CausalLM(small_rl.POLICY, dtype)
    model.init_weights(seed)
    convert(model, recipe_named(recipe))
    refresh_weights(model)
    return model


def drawn(engine: Engine, count: int = 6, new: int = 24) -> list[TrainingSample]:
    """Samples of the engine, with alternating advantages."""
    params = SamplingParams(temperature=TEMPERATURE, max_new_tokens=new, n=2, ignore_eos=True)
    requests = [Request(tuple(range(5, 12 + i)), dataclasses.replace(params, seed=i)) for i in range(count)]
    return [
        TrainingSample(request.prompt_ids, c.token_ids, c.logprobs, 1.0 if c.index else -1.0)
        for request, group in zip(requests, engine.generate(requests))
        for c in group
    ]


def update(model: CausalLM, samples: list[TrainingSample], lr: float = 0.0, updates: int = 1) -> list[StepResult]:
    """Optimiser steps on the samples, as the loop makes them."""
    from infir2.config import OptimSection

    optimizer = build_optimizer(model, OptimSection(lr=lr or 1e-9))
    objective = PolicyObjective(PolicySection(), TEMPERATURE)
    shares = [pack_samples(share, 256) for share in split_samples(samples, updates)]
    if updates > 1:
        compute = lambda batch: batch_logprobs(model, batch, attention_for, TEMPERATURE)  # noqa: E731
        shares = [[with_logprobs(batch, "old", compute) for batch in share] for share in shares]
    results = []
    for share in shares:
        result = train_step(model, optimizer, share, small_rl.WORLD, attention_for, 1.0, objective=objective)
        assert result is not None
        results.append(result)
    return results


def test_every_token_of_every_sample_lies_where_its_label_is() -> None:
    samples = toy_samples() + toy_samples(4)
    batches = pack_samples(samples, 40)
    found = []
    for batch in batches:
        assert batch.labels.numel() == 128
        bounds = batch.cu_seqlens.tolist()
        for start, end in pairwise(bounds):
            here = slice(start, end)
            trained = batch.labels[0, here] != IGNORE
            if not trained.any():
                continue  # filling
            labels = batch.labels[0, here][trained].tolist()
            prompt = batch.input_ids[0, here][: len(trained) - len(labels) + 1].tolist()
            logprobs = batch.behaviour[0, here][trained].tolist()
            advantage = set(batch.advantages[0, here][trained].tolist())
            assert len(advantage) == 1
            found.append((tuple(prompt), tuple(labels), pytest.approx(logprobs), pytest.approx(advantage.pop())))
    expected = [(s.prompt_ids, s.response_ids, s.logprobs, s.advantage) for s in samples]
    assert len(found) == len(expected)
    for sample in expected:
        assert sum(all(a == b for a, b in zip(sample, other)) for other in found) == 1


def test_shares_are_even_and_in_order() -> None:
    samples = toy_samples()
    shares = split_samples(samples, 4)
    assert [sample for share in shares for sample in share] == samples
    assert sorted(map(len, shares)) == [2, 2, 2, 3]


def test_to_a_device_keeps_class_and_values() -> None:
    batch = pack_samples(toy_samples(), 128)[0]
    moved = batch.to("cpu")
    assert type(moved) is type(batch)
    assert moved.old is None
    assert torch.equal(moved.behaviour, batch.behaviour)
    assert moved.to("meta").advantages.is_meta


# In FP8 a difference in the last bit can round an activation to its other neighbour, now and then.
LIMITS = {"bf16": 2e-6, "blockwise": 5e-4}


@pytest.mark.parametrize("recipe", LIMITS)
def test_on_policy_the_ratio_is_one_and_trainer_equals_engine(recipe: str) -> None:
    """The trainer's temperature is the sampler's, its codes are the engine's: nothing is left but rounding."""
    model, limit = build(recipe), LIMITS[recipe]
    samples = drawn(Engine(model, options=EngineOptions(cache_tokens=4096)))
    (result,) = update(model, samples)
    assert result.means["update_kl"] == 0
    assert result.means["clip_low"] == result.means["clip_high"] == 0
    assert result.means["logprob_diff"] < limit
    assert result.means["token_mult_prob_error"] == pytest.approx(1, abs=2 * limit)
    assert result.means["importance_weight"] == pytest.approx(1, abs=2 * limit)
    advantages = sum(s.advantage * len(s.response_ids) for s in samples) / result.valid_tokens
    assert result.loss == pytest.approx(-advantages, abs=2 * limit), "a ratio of exactly 1 leaves the mean advantage"


def test_another_temperature_would_show_as_mismatch() -> None:
    model = build()
    samples = drawn(Engine(model, options=EngineOptions(cache_tokens=4096)))
    batches = pack_samples(samples, 256)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    result = train_step(model, optimizer, batches, small_rl.WORLD, attention_for, 1.0,
                        objective=PolicyObjective(PolicySection(), 1.0))  # fmt: skip
    assert result is not None
    assert result.means["logprob_diff"] > 1e-3


def test_several_updates_on_one_rollout_leave_the_policy_that_drew_it() -> None:
    """The first is on-policy to the last bit, because its old log-probabilities come from the same pass; later ones
    are not."""
    model = build()
    first, second, third = update(model, drawn(Engine(model, options=EngineOptions(cache_tokens=4096))), 0.02, 3)
    assert first.means["update_kl"] == 0
    assert second.means["update_kl"] > 0
    assert third.means["clip_low"] + third.means["clip_high"] > 0
    assert third.means["logprob_diff"] < 2e-6, "mismatch compares the weights that drew the samples"


def test_trainer_and_engine_use_the_same_codes_before_and_after_an_update() -> None:
    model = build("blockwise")
    engine = Engine(model, options=EngineOptions(cache_tokens=4096))
    layer = next(module for module in model.modules() if isinstance(module, Fp8Linear))
    operands = []
    for version in (1, 2):
        samples = drawn(engine)
        operands.append(layer.weight_operand().codes.clone())  # an update writes into the same memory
        (result,) = update(model, samples, lr=0.02)
        assert result.means["logprob_diff"] < LIMITS["blockwise"], "also with the weights of the update before"
        sync_weights(model, engine, version)
        assert engine.weight_version == version
        assert layer.weight_operand() is layer.weight_operand(), "made once an update, for both"
    assert not torch.equal(operands[0].view(torch.uint8), operands[1].view(torch.uint8))


class Remote(Engine):
    """An engine that holds weights of its own, as one in another process does."""

    @property
    def capabilities(self) -> Capabilities:
        return dataclasses.replace(super().capabilities, shared_weights=False)


@pytest.mark.parametrize(("recipe", "dtype"), [("bf16", torch.float32), ("blockwise", torch.bfloat16)])
def test_an_engine_with_its_own_weights_is_sent_them(recipe: str, dtype: torch.dtype) -> None:
    model = build(recipe, dtype)
    remote = Remote(copy.deepcopy(model), options=EngineOptions(cache_tokens=4096))
    local = Engine(model, options=EngineOptions(cache_tokens=4096))
    update(model, drawn(local), lr=0.02)
    assert drawn(remote) != drawn(local)
    for engine in (remote, local):
        sync_weights(model, engine, 1)
    assert drawn(remote) == drawn(local), "the same tokens with the same log-probabilities"
    if dtype == torch.float32:
        assert remote.checksum() == local.checksum()


def test_a_sync_of_the_version_that_is_there_does_nothing() -> None:
    model = build()
    engine = Engine(model, options=EngineOptions(cache_tokens=4096), weight_version=4)
    sync_weights(model, engine, 4)
    assert engine.weight_version == 4
    assert {v for c in engine.generate([Request((1, 2), SamplingParams(max_new_tokens=2))])[0] for v in c.versions} == {
        4
    }


def test_logprobs_of_a_batch_are_those_of_the_training_step(tmp_path: Path) -> None:
    model = build("blockwise")
    batch = pack_samples(drawn(Engine(model, options=EngineOptions(cache_tokens=4096))), 256)[0]
    fixed = batch_logprobs(model, batch, attention_for, TEMPERATURE)
    assert fixed.shape == batch.labels.shape
    assert not fixed[batch.labels == IGNORE].any()
    objective = PolicyObjective(PolicySection(kl_coef=0.1), TEMPERATURE)
    batch = with_logprobs(with_logprobs(batch, "old", lambda _: fixed), "reference", lambda _: fixed)
    _, sums = model(batch.input_ids, batch.position_ids, attention_for(batch),
                    head=lambda hidden, weight: objective(hidden, weight, batch))  # fmt: skip
    assert sums["update_kl"] == sums["reference_kl"] == 0
