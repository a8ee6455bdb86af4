"""What a dry run tells: memory, against counting by hand and against what was measured; and all that is missing."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infir2 import cli
from infir2.config import CptConfig, RlConfig
from infir2.launch.dry_run import GIB, Memory, estimate_memory
from infir2.launch.kept_activations import kept_by_layers
from infir2.launch.model import convert_as
from infir2.model.presets import preset
from infir2.model.transformer import CausalLM

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench/results"


def config_of(name: str, precision: str = "hybrid", **changes: Any) -> CptConfig:
    table: dict[str, dict[str, Any]] = {
        "model": {"preset": name},
        "fp8": {"recipe": precision},
        "data": {"seq_len": 8192, "sources": {"a": 1}},
        "optim": {"lr": 1e-4},
        "train": {"steps": 1, "global_batch": 1},
        "parallel": {},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        table[section][name] = value
    return CptConfig.model_validate({"run": "x", **table})


def model_of(config: CptConfig, layers: int = 0) -> CausalLM:
    shape = preset(config.model.preset or "")
    with torch.device("meta"):
        model = CausalLM(dataclasses.replace(shape, num_hidden_layers=layers or shape.num_hidden_layers))
    convert_as(model, config.fp8)
    return model


def estimate(name: str, tokens: int, precision: str = "hybrid", world_size: int = 1, **changes: Any) -> Memory:
    config = config_of(name, precision, **changes)
    return estimate_memory(config, model_of(config), world_size, tokens)


def test_a_7b_step_by_hand() -> None:
    """Qwen2.5-7B, 8,192 tokens, one GPU: 7.62 billion parameters, of which 6.53 in FP8 layers."""
    parameters, linears = 7_615_616_512, 28 * (3584 * (3584 + 2 * 512) + 3584 * 3584 + 3 * 3584 * 18944)
    memory = estimate("qwen2.5-7b", 8192)
    assert memory.lasting == {
        "master weights (float32)": 4 * parameters,
        "AdamW moments (float32)": 8 * parameters,
        "FP8 weights": linears,
    }
    assert memory.gradients == 4 * parameters
    h, scale = 3584, 4 / 128
    codes = 1 + scale
    # Twice the residual stream and what its norm quantised; q, k, v, attention's output and its codes; gate and up.
    layer = 2 * (2 * h + codes * h) + 2 * (4608 + h) + 4 * 28 + codes * h + codes * 2 * 18944
    assert memory.passing["activations"] == pytest.approx(28 * 8192 * layer, rel=1e-3)
    small = estimate("qwen2.5-7b", 8192, optim__moments="bfloat16")
    assert small.lasting["AdamW moments (bfloat16)"] == 4 * parameters
    assert memory.peak - small.peak == 4 * parameters
    several = estimate("qwen2.5-7b", 8192, train__global_batch=4)
    assert several.peak == sum(several.lasting.values()) + sum(several.passing.values()) + several.gradients


def test_options_that_cost_or_save_memory() -> None:
    plain = estimate("qwen2.5-1.5b", 16384)
    head = estimate("qwen2.5-1.5b", 16384, fp8__head=True)
    assert "output head (FP8)" in head.passing
    layers, vocabulary, h = 28, 151_936, 1536
    held = 16384 * vocabulary  # transposed codes of the logits' gradient
    codes_and_gradient = (2 + 4) * vocabulary * h
    assert head.passing["output head (FP8)"] == codes_and_gradient + 3 * 2**28 + held
    full = estimate("qwen2.5-1.5b", 16384, train__activation_checkpointing="full")
    assert full.passing["activations"] == layers * 16384 * h * 2
    wide = estimate("qwen2.5-1.5b", 16384, fp8__mlp_activations="bf16")
    # Two bytes instead of one and a 32nd for each of gate and up.
    more = layers * 16384 * 2 * 8960 * (2 - 1 - 4 / 128)
    assert wide.passing["activations"] - plain.passing["activations"] == pytest.approx(more)
    rowwise = estimate("qwen2.5-1.5b", 128, "rowwise")
    assert rowwise.lasting["FP8 weights"] == 2 * plain.lasting["FP8 weights"], "W and its transpose"
    assert estimate("qwen2.5-1.5b", 128, "bf16").lasting["FP8 weights"] == 0


def test_shards() -> None:
    one, two = (estimate("qwen2.5-1.5b", 8192, world_size=size, train__global_batch=size) for size in (1, 2))
    assert two.lasting["master weights (float32)"] == one.lasting["master weights (float32)"] / 2
    assert two.lasting["FP8 weights"] == one.lasting["FP8 weights"], "every process has all codes"
    assert two.gradients == one.gradients / 2
    several = estimate("qwen2.5-1.5b", 8192, world_size=2, train__global_batch=4)
    assert several.gradients == one.gradients, "FSDP2 adds up whole gradients"
    copies = estimate("qwen2.5-1.5b", 8192, world_size=2, train__global_batch=2, parallel__replicate=2)
    assert copies.lasting == one.lasting


def test_compiled_bf16_layers_keep_less() -> None:
    config = config_of("tiny", "bf16")
    kept = [kept_by_layers(model_of(config, layers=2), 256, compiled) for compiled in (False, True)]
    assert len(kept[1]) == 2
    assert 0.5 * kept[0][0] < kept[1][0] < kept[0][0]


MEASURED = [
    ("step_1.5b_8k_h200.json", "qwen2.5-1.5b", 16384),
    ("step_1.5b_32k_h200.json", "qwen2.5-1.5b", 32768),
    ("step_7b_8k_h200.json", "qwen2.5-7b", 8192),
]


@pytest.mark.parametrize("precision", ["hybrid", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("file", "name", "tokens"), MEASURED)
def test_the_estimate_is_near_what_was_measured(file: str, name: str, tokens: int, precision: str) -> None:
    """`infir2 bench step` without an optimiser: one micro-batch, compiled layers."""
    rows = json.loads((RESULTS / file).read_text())["rows"]
    measured = next(row["peak GiB"] for row in rows if row["what"] == f"infir2 {precision}")
    memory = estimate(name, tokens, precision, train__compile=True)
    ours = (memory.peak - memory.lasting["AdamW moments (float32)"]) / GIB
    print(f"{name}, {tokens} tokens, {precision}: estimated {ours:.1f} GiB, measured {measured:.1f}")
    assert ours == pytest.approx(measured, rel=0.1)


def test_keeping_attention_lies_between() -> None:
    none, attention, full = (
        estimate("qwen2.5-1.5b", 16384, train__activation_checkpointing=policy).passing["activations"]
        for policy in ("none", "attention", "full")
    )
    heads = 2 * (12 + 2) * 128 * 2 + 4 * 12  # q, k, v and the output in bfloat16, a float32 a head
    assert attention == full + 28 * 16384 * heads
    assert full < attention < none / 2


# Shipped recipes, where nothing that they name is there

DryRun = Callable[..., tuple[str, list[str]]]


@pytest.fixture
def dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> DryRun:
    """``dry_run("cpt", "cpt_1.5b", ...)`` -> what it tells, and its errors; the folder stays as empty as it is."""
    monkeypatch.chdir(tmp_path)

    def start(command: str, recipe: str, *words: str) -> tuple[str, list[str]]:
        assert cli.main([command, str(ROOT / f"recipes/{recipe}.toml"), "--dry-run", *words]) == 2
        assert not any(tmp_path.iterdir())
        told = capsys.readouterr()
        return told.out, told.err.splitlines()

    return start


def test_what_can_be_known_of_continual_training_is_told_and_all_that_is_missing(dry_run: DryRun) -> None:
    words = ("cpt", "cpt_1.5b", "--data.sources", '{ "data/a" = 1, "data/b" = 1 }')
    told, (first, second, third) = dry_run(*words)
    assert "parameters: 1,543,714,304" in told
    assert "in 40,000 steps of 128 sequences" in told
    assert "together" in told
    assert "models/Qwen2.5-1.5B is not there: these are the sizes of the preset qwen2.5-1.5b" in told
    assert first.startswith("infir2: error: data.sources: data/a: there is neither")
    assert second.startswith("infir2: error: data.sources: data/b: there is neither")
    assert third.endswith("hf download Qwen/Qwen2.5-1.5B --local-dir models/Qwen2.5-1.5B")
    told, _ = dry_run(*words, "--model.path", "models/secret")
    assert "parameters:" not in told
    assert 'path = "models/secret"' in told, "the resolved recipe at least"
    told, errors = dry_run(*words, "--model.preset", "tiny")
    assert "the vocabulary is the preset's own" in told
    assert len(errors) == 2


def test_reinforcement_learning_tells_of_its_reference_and_that_its_tokens_are_a_bound(dry_run: DryRun) -> None:
    words = ("rl", "rl_1.5b_stage1", "--model.path", "models/Qwen2.5-1.5B", "--init.checkpoint", "null")
    told, _ = dry_run(*words)
    assert "tokens: at most " in told
    assert "reference" not in told
    told, _ = dry_run(*words, "--policy.kl_coef", "0.001")
    gigabytes = dict(re.findall(r"^  (.+?) +([\d.]+) GiB$", told, re.MULTILINE))
    masters, codes = (float(gigabytes[name]) for name in ("master weights (float32)", "FP8 weights"))
    assert float(gigabytes["reference of the KL term"]) == pytest.approx(masters + codes, abs=0.02)


def test_each_process_of_reinforcement_learning_holds_the_whole_model() -> None:
    table = {"run": "x", "model": {"preset": "tiny"}, "data": {"train": "a"}, "optim": {"lr": 1e-4}}
    table |= {"train": {"steps": 1, "global_batch": 2048, "eval_every": 0}}
    config = RlConfig.model_validate(table)
    with torch.device("meta"):
        model = CausalLM(preset("tiny"))
    one, two = (estimate_memory(config, model, size, 8192) for size in (1, 2))
    assert one == two


@pytest.mark.parametrize(("command", "start"), [("rl", "model"), ("sft", "model"), ("rl", "checkpoint")])
def test_all_that_is_missing_for_fine_tuning_and_reinforcement_learning_is_told(
    dry_run: DryRun, command: str, start: str
) -> None:
    place = "models/Qwen2.5-1.5B"
    words = ["--data.train", "gone.jsonl", "--data.validation", "away.jsonl"]
    if start == "model":
        words += ["--model.path", place, "--init.checkpoint", "null"]
    else:
        words += ["--init.checkpoint", place]
    told, (train, held_out, model) = dry_run(command, f"{command}_1.5b_stage1", *words)
    assert ("parameters: 1,543,714,304" in told) == (start == "model")
    assert f'run = "runs/{command}_1.5b_stage1"' in told
    assert train == "infir2: error: data.train: gone.jsonl: no such file or folder"
    assert held_out == "infir2: error: data.validation: away.jsonl: no such file or folder"
    assert model.startswith(f"infir2: error: {place}: no ")
