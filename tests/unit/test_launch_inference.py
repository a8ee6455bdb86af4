"""A model that a user names, run: whatever it lies in, the engine multiplies with the very weights that are stored."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_chat
import torch
from rich.console import Console

from infir2 import cli
from infir2.checkpoint.fp8_format import quantize_weight
from infir2.checkpoint.model_source import open_model_source
from infir2.errors import ConfigError, DataError
from infir2.fp8.linear import Fp8Linear
from infir2.launch.end_tokens import end_ids
from infir2.launch.inference import InferenceOptions, load_engine, model_name
from infir2.rollout.engine import Engine
from infir2.rollout.records import Request, SamplingParams
from infir2.stages.convert import Options, convert_model

QUIET = Console(quiet=True)
SMALL: dict[str, Any] = {"cache_tokens": 2048}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_chat.write_chat_model(tmp_path_factory.mktemp("chat"))


def load(path: Path, **options: Any) -> Engine:
    return load_engine(str(path), InferenceOptions(**{**SMALL, **options}), QUIET)[0]


def fp8_layers(engine: Engine) -> dict[str, Fp8Linear]:
    return {name: module for name, module in engine.model.named_modules() if isinstance(module, Fp8Linear)}


def greedy(engine: Engine) -> tuple[int, ...]:
    request = Request(tuple(range(5, 45)), SamplingParams(temperature=0, max_new_tokens=20))
    return engine.generate([request])[0][0].token_ids


def test_a_plain_folder_runs_in_bf16_or_quantised_on_request(hf: Path) -> None:
    plain = load(hf)
    assert not fp8_layers(plain)
    assert {parameter.dtype for parameter in plain.model.parameters()} == {torch.bfloat16}
    rounded = open_model_source(str(hf), torch.float32).tensors.tensor("model.norm.weight").bfloat16()
    assert torch.equal(plain.model.model.norm.weight, rounded)
    assert load(hf, dtype="float32").model.model.compute_dtype == torch.float32
    assert len(fp8_layers(load(hf, precision="blockwise"))) == 14


def test_a_cache_of_no_tokens_is_refused(hf: Path) -> None:
    with pytest.raises(ConfigError, match="cache_tokens: 0 is less than 1"):
        load(hf, cache_tokens=0)


@pytest.mark.parametrize("scale_format", ["ue8m0", "fp32"])
def test_an_fp8_folder_runs_with_the_values_that_it_stores(hf: Path, tmp_path: Path, scale_format: str) -> None:
    convert_model(str(hf), tmp_path / "fp8", "fp8", Options(scale_format=scale_format))
    stored = open_model_source(str(tmp_path / "fp8"), torch.float32)
    engine = load(tmp_path / "fp8")
    layers = fp8_layers(engine)
    assert len(layers) == 14
    for name, layer in layers.items():
        assert layer.recipe.scale_format == scale_format
        values = layer.weight_operand().dequantize(torch.float32)
        kept = stored.tensors.tensor(f"{name}.weight")
        if scale_format == "ue8m0":
            assert torch.equal(values, kept), name
        else:  # bfloat16 rounds code x scale before it is quantised anew
            assert (values - kept).abs().max() <= 2**-7 * kept.abs().max(), name
    if scale_format == "ue8m0":
        assert greedy(engine) == greedy(load(hf, precision="blockwise"))
    assert not fp8_layers(load(tmp_path / "fp8", precision="bf16"))


def test_a_run_is_served_in_the_precision_it_trained_in(hf: Path, recipe: Callable[..., tuple[Path, Path]]) -> None:
    changes = {"train.steps": 4, "train.eval_every": 0, "fp8.recipe": "hybrid", "fp8.bf16_first_layers": 1}
    path, run = recipe("run", **changes)
    assert cli.main(["cpt", str(path)]) == 0
    with pytest.raises(DataError, match="no tokenizer goes with this model"):
        load(run)
    engine = load(run, tokenizer=hf)
    layers = fp8_layers(engine)
    assert {name.split(".")[2] for name in layers} == {"1"}
    source = open_model_source(str(run))
    for name, layer in layers.items():
        assert layer.recipe.name == "hybrid"
        expected = quantize_weight(source.tensors.tensor(f"{name}.weight"), "ue8m0")
        assert torch.equal(layer.weight_operand().codes.view(torch.uint8), expected.codes.view(torch.uint8)), name
    assert not fp8_layers(load(run / "checkpoints" / "step-000004", tokenizer=hf, precision="bf16"))
    assert model_name(str(run)) == "run"
    assert model_name(str(run / "checkpoints" / "step-000004")) == "run-step-000004"


def test_generation_config_adds_end_tokens(hf: Path) -> None:
    source = open_model_source(str(hf))
    source.texts["generation_config.json"] = '{"eos_token_id": [5, 7]}'
    assert end_ids(source) == (5, 7)
    source.texts["generation_config.json"] = '{"eos_token_id": 5}'
    assert end_ids(source) == (5,)
    source.texts["generation_config.json"] = "broken"
    assert end_ids(source) == ()
