"""Every shipped recipe parses, and carries the paper's numbers."""

import importlib
import re
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic_core import PydanticUndefined

from infir2.cli import Parser
from infir2.config import CptConfig, RlConfig, SftConfig, TrainingConfig, load, parse, to_toml
from infir2.launch.pipeline_plan import PipelineConfig, make_plan
from infir2.model.presets import preset

RECIPES = Path(__file__).parents[2] / "recipes"
STAGES: dict[str, type[TrainingConfig]] = {"cpt": CptConfig, "sft": SftConfig, "rl": RlConfig}


PIPELINES = sorted(RECIPES.glob("pipeline_*.toml"))


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.name)
def test_every_stage_of_a_pipeline_can_be_started(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPES.parent)
    plan = make_plan(load(PipelineConfig, path), path.name)
    for step in plan.steps:
        stage, *words = step.words
        if stage in STAGES:
            recipe, *overrides = words
            config = load(STAGES[stage], recipe, overrides)
            assert config.run == str(plan.run / step.name)
        else:
            parser = Parser(prog=stage)
            importlib.import_module(f"infir2.stages.{stage}").add_arguments(parser)
            parser.parse_args(words)


def test_the_demos_have_the_same_stages() -> None:
    tiny, small = (load(PipelineConfig, RECIPES / f"pipeline_{size}.toml") for size in ("tiny", "small"))
    assert [stage.name for stage in small.stage] == [stage.name for stage in tiny.stage]


@pytest.mark.parametrize("size", ["1.5b", "7b"])
def test_the_papers_chain_trains_every_token_once(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run starts from the one before; pre-training, whose schedule ends with a decay, is a single run."""
    monkeypatch.chdir(RECIPES.parent)
    path = RECIPES / f"pipeline_{size}.toml"
    plan = make_plan(load(PipelineConfig, path), path.name)
    runs = [(step.name, *step.words) for step in plan.steps if step.words[0] in STAGES]
    assert [stage for _, stage, *_ in runs] == ["cpt", "sft", "sft", "rl", "rl"]
    for (before, *_), (_, stage, recipe, *overrides) in pairwise(runs):
        assert load(STAGES[stage], recipe, overrides).init.checkpoint == str(plan.run / before)


@pytest.mark.parametrize("path", sorted({*RECIPES.glob("*.toml")} - {*PIPELINES}), ids=lambda path: path.name)
def test_every_recipe_parses_and_survives_a_round_trip(path: Path) -> None:
    kind = STAGES[path.name.partition("_")[0]]
    config = load(kind, path)
    assert parse(kind, to_toml(config), "copy") == config
    assert config.run == f"runs/{path.stem}"


@pytest.mark.parametrize("size", ["1.5b", "7b"])
def test_the_papers_numbers(size: str) -> None:
    config = load(CptConfig, RECIPES / f"cpt_{size}.toml")
    optim, train = config.optim, config.train
    assert (config.data.seq_len, train.global_batch, train.steps) == (32768, 128, 40_000)
    assert (optim.lr, optim.min_lr, optim.warmup_steps, optim.decay_steps) == (1e-4, 1e-5, 5000, 5000)
    assert (optim.betas, optim.weight_decay, optim.clip, train.seed) == ((0.9, 0.95), 0.1, 1.0, 1236)
    assert (config.fp8.recipe, config.fp8.scale_format) == ("blockwise", "ue8m0")
    decay = load(CptConfig, RECIPES / f"cpt_{size}_decay.toml")
    assert decay.init.checkpoint == f"runs/cpt_{size}/checkpoints/step-035000"
    assert train.keep_every
    assert 35_000 % train.keep_every == 0
    assert (decay.optim.warmup_steps, decay.optim.decay_steps, decay.train.steps) == (0, 5000, 5000)
    assert decay.model == config.model
    assert decay.data == config.data


@pytest.mark.parametrize(("size", "lr"), [("1.5b", 5e-5), ("7b", 2e-5)])
def test_the_papers_numbers_for_fine_tuning(size: str, lr: float) -> None:
    one, two = (load(SftConfig, RECIPES / f"sft_{size}_stage{stage}.toml") for stage in (1, 2))
    for config in (one, two):
        optim, train, data = config.optim, config.train, config.data
        assert (optim.lr, optim.min_lr) == (lr, pytest.approx(lr / 10))
        assert (optim.schedule, optim.warmup_fraction) == ("cosine", 0.05)
        assert (optim.betas, optim.weight_decay, optim.clip) == ((0.9, 0.95), 0.0, 1.0)
        assert (train.epochs, train.global_batch, train.activation_checkpointing) == (5, 64, "none")
        assert (data.max_length, data.max_tokens_per_gpu) == (32_768, 32_768)
        assert (config.fp8.recipe, config.fp8.scale_format) == ("blockwise", "ue8m0")
    assert two.init.checkpoint == one.run
    assert not two.init.keep_optimizer
    assert not two.model.is_named, "stage 2 takes stage 1's model"
    assert two.optim == one.optim
    assert two.train == one.train


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_the_stages_of_the_demos_models_follow_each_other(size: str) -> None:
    start = load(CptConfig, RECIPES / f"cpt_{size}.toml")
    one, two = (load(SftConfig, RECIPES / f"sft_{size}_stage{stage}.toml") for stage in (1, 2))
    assert one.init.checkpoint == start.run
    assert two.init.checkpoint == one.run


def test_the_small_model_has_qwens_shape_and_more_than_100_million_parameters() -> None:
    start = load(CptConfig, RECIPES / "cpt_small.toml")
    model = preset(start.model.preset or "", 8192)
    assert model.model_type == "qwen2"
    assert 100e6 < model.num_parameters() < 150e6


@pytest.mark.parametrize("size", ["1.5b", "7b"])
def test_the_papers_numbers_for_reinforcement_learning(size: str) -> None:
    one, two = (load(RlConfig, RECIPES / f"rl_{size}_stage{stage}.toml") for stage in (1, 2))
    for config, tokens, temperature in ((one, 8192, 1.0), (two, 16_384, 1.1)):
        rollout, policy, optim = config.rollout, config.policy, config.optim
        assert (rollout.max_new_tokens, rollout.temperature) == (tokens, temperature)
        assert (rollout.prompts, rollout.samples, config.train.global_batch, config.updates) == (128, 16, 2048, 1)
        assert (rollout.filter_groups, rollout.oversample) == (True, 3)
        assert (policy.clip_low, policy.clip_high, policy.kl_coef, policy.entropy_coef) == (0.2, 0.28, 0.0, 0.0)
        assert policy.importance == "token"
        assert (optim.lr, optim.schedule, optim.betas, optim.weight_decay) == (1e-6, "constant", (0.9, 0.98), 0.1)
        assert (config.train.eval_every, config.train.save_every, config.eval.samples) == (20, 20, 16)
        assert config.fp8.recipe == "blockwise"
    assert one.init.checkpoint == f"runs/sft_{size}_stage2"
    assert two.init.checkpoint == one.run
    assert two.policy == one.policy
    assert two.optim == one.optim
    assert two.train == one.train


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_the_rl_stages_of_the_demos_models_follow_fine_tuning_and_each_other(size: str) -> None:
    one, two = (load(RlConfig, RECIPES / f"rl_{size}_stage{stage}.toml") for stage in (1, 2))
    assert one.init.checkpoint == load(SftConfig, RECIPES / f"sft_{size}_stage2.toml").run
    assert two.init.checkpoint == one.run
    assert (one.rollout.temperature, two.rollout.temperature) == (1.0, 1.1)
    assert two.rollout.max_new_tokens > one.rollout.max_new_tokens


def test_the_guide_to_rl_names_every_key_of_its_sections_with_its_default() -> None:
    text = (RECIPES.parent / "docs/rl.md").read_text()
    (block,) = re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)
    written = tomllib.loads(block)
    sections = RlConfig.model_fields
    for name, values in written.items():
        section = sections[name].annotation
        assert section is not None
        # A key that does not go with the defaults stands in a comment.
        told = {*values, *re.findall(r"^# (\w+) = ", block, flags=re.MULTILINE)}
        assert set(values) <= set(section.model_fields) <= told, name
        checked = section.model_validate(values)
        for key, field in section.model_fields.items():
            if field.default not in (None, PydanticUndefined):
                assert getattr(checked, key) == field.default, f"{name}.{key}"
    assert set(written) == {"data", "rollout", "reward", "policy", "eval"}
