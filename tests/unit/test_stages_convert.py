"""`infir2 convert`: every format into every other, every tensor accounted for, nothing half-written, little memory."""

import dataclasses
import json
import resource
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import ARCHITECTURE, metrics_lines, write_model, write_recipe
from tensors import assert_same_tensors, tensors_in
from torch import Tensor

from infir2.checkpoint import manifest
from infir2.checkpoint.model_source import open_model_source
from infir2.cli import main
from infir2.launch.model_card import model_card
from infir2.stages.convert import Options, convert_model, plan

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2 tied": {},
    "qwen2 untied": {"tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3", "qk_norm": True, "qkv_bias": False},
    "llama": {"model_type": "llama", "qkv_bias": False, "tie_word_embeddings": False},
}


def bf16_model(folder: Path, **changes: Any) -> Path:
    """A bfloat16 folder with a tokenizer and what else goes with a model."""
    convert_model(str(write_model(folder.parent / "as-fp32", **changes)), folder, options=Options(dtype="bfloat16"))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    (folder / "LICENSE").write_text("mine")
    return folder


CARRIED = ("tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE")


def error_of(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    capsys.readouterr()
    assert main(["convert", *map(str, words)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "chat_template.jinja"])
def test_no_link_carries_a_file_of_this_machine_into_the_result(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model from a stranger could have it that a private key is published with what was made of it."""
    source = bf16_model(tmp_path / "hf")
    (tmp_path / "id_rsa").write_text("private")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(tmp_path / "id_rsa")
    line = error_of(capsys, source, tmp_path / "out", "--to", "hf")
    assert f"{name}: refused: a link that leaves" in line
    assert not (tmp_path / "out").exists()


# Round trips


@pytest.mark.parametrize("family", FAMILIES)
def test_hf_to_checkpoint_and_back(tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = bf16_model(tmp_path / "hf", **FAMILIES[family])
    assert main(["convert", str(source), str(tmp_path / "dcp"), "--to", "dcp"]) == 0
    assert main(["convert", str(tmp_path / "dcp"), str(tmp_path / "back")]) == 0
    assert_same_tensors(tensors_in(tmp_path / "back"), tensors_in(source))
    told = capsys.readouterr().out
    assert f"{len(tensors_in(source))} tensors" in told
    assert "GB/s" in told
    assert "note:" not in told
    assert main(["convert", str(tmp_path / "as-fp32"), str(tmp_path / "bare")]) == 0
    said = f"note: {tmp_path}/as-fp32 has no tokenizer, so {tmp_path}/bare gets none; --tokenizer names one"
    assert said in capsys.readouterr().out
    ours, theirs = (open_model_source(str(tmp_path / name)) for name in ("back", "hf"))
    assert ours.architecture == theirs.architecture
    for name in CARRIED:
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    assert not list(tmp_path.glob(f"{manifest.TEMPORARY}*"))


@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_and_single_files(tmp_path: Path, family: str) -> None:
    source = bf16_model(tmp_path / "hf", **FAMILIES[family])
    sharded, single = tmp_path / "sharded", tmp_path / "single"
    convert_model(str(source), sharded, options=Options(max_shard_gb=1e-4))
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    assert len(files) > 5
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors_in(source).values())
    for file in files:
        held = load_file(sharded / file)  # safetensors checks the header: no hole, no overlap
        assert {name for name, place in index["weight_map"].items() if place == file} == held.keys()
        assert len(held) == 1 or sum(value.nbytes for value in held.values()) <= 100_000
    assert_same_tensors(tensors_in(sharded), tensors_in(source))
    convert_model(str(sharded), single)
    assert (single / "model.safetensors").exists()
    assert_same_tensors(tensors_in(single), tensors_in(source))
    convert_model(str(sharded), tmp_path / "fp8", "fp8", Options(max_shard_gb=1e-4, scale_dtype="e8m0"))
    convert_model(str(source), tmp_path / "fp8-single", "fp8", Options(scale_dtype="e8m0"))
    one, many = tensors_in(tmp_path / "fp8-single"), tensors_in(tmp_path / "fp8")
    assert {name: value.float().sum() for name, value in one.items()} == {
        name: value.float().sum() for name, value in many.items()
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes(tmp_path: Path, dtype: Any) -> None:
    source = write_model(tmp_path / "fp32")
    convert_model(str(source), tmp_path / "cast", options=Options(dtype=dtype))
    expected = {name: value.to(getattr(torch, dtype)) for name, value in tensors_in(source).items()}
    assert_same_tensors(tensors_in(tmp_path / "cast"), expected)
    config = json.loads((tmp_path / "cast/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    convert_model(str(tmp_path / "cast"), tmp_path / "kept")
    assert_same_tensors(tensors_in(tmp_path / "kept"), expected)
    assert json.loads((tmp_path / "kept/config.json").read_text()) == config
    convert_model(str(tmp_path / "cast"), tmp_path / "dcp", "dcp")
    convert_model(str(tmp_path / "dcp"), tmp_path / "back", options=Options(dtype=dtype))
    assert_same_tensors(tensors_in(tmp_path / "back"), expected)


# Runs


def test_a_run(recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, run = recipe(**{"train.steps": 2, "optim.decay_steps": 0, "train.eval_every": 0})
    assert main(["cpt", str(path)]) == 0
    assert main(["convert", str(run), str(tmp_path / "hf")]) == 0
    source = open_model_source(str(run))
    assert source.path == run / "checkpoints/step-000002"
    stored = tensors_in(tmp_path / "hf")
    assert stored.keys() == source.names.keys()
    for name, value in stored.items():
        assert torch.equal(value, source.tensors.tensor(name).bfloat16())
    card = (tmp_path / "hf/README.md").read_text()
    meta = json.loads((source.path / "meta.json").read_text())
    start = meta["config"]["model"]["path"]
    for fact in (meta["data"]["sha256"], "2 steps", f"Started from: model folder `{start}`", "recipe `blockwise`"):
        assert fact in card
    assert json.dumps(meta["config"], indent=1) in card
    words = ["convert", str(run), str(tmp_path / "fp8"), "--to", "fp8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["/somewhere/infir2/__main__.py", *words])  # as a chain starts its stages
        assert main(words) == 0
    card = (tmp_path / "fp8/README.md").read_text()
    assert f"Converted by: `infir2 {' '.join(words)}`" in card
    assert "very ones that the trainer's next forward pass would use" in card
    assert "`lm_head` (the output head stays in bf16)" in card
    convert_model(str(tmp_path / "fp8"), tmp_path / "again")
    assert (tmp_path / "again/README.md").read_text() == card, "the card goes along"


@pytest.mark.parametrize(
    ("fp8", "chosen", "scale_format", "fidelity"),
    [
        ({"recipe": "blockwise", "scale_format": "fp32"}, None, "fp32", "are the very ones"),
        ({"recipe": "hybrid", "scale_format": "fp32"}, "ue8m0", "ue8m0", "whose scales were fp32"),
        ({"recipe": "rowwise", "scale_format": "ue8m0"}, None, "ue8m0", "does not use 128 x 128 block scales"),
        ({"recipe": "bf16", "scale_format": "fp32"}, None, "ue8m0", "quantised after training"),
        ({"recipe": "blockwise", "scale_format": "ue8m0", "bf16_last_layers": 1}, None, "ue8m0", "are the very ones"),
    ],
)
def test_the_export_follows_the_run(
    start_model: Path, fp8: dict[str, Any], chosen: Any, scale_format: str, fidelity: str
) -> None:
    source = dataclasses.replace(open_model_source(str(start_model)), kind="dcp", meta={"config": {"fp8": fp8}})
    export = plan(source, Options(scale_format=chosen))
    assert export.scale_format == scale_format
    assert fidelity in model_card(source, export)["README.md"]
    kept = {name.partition(".self_attn")[0].partition(".mlp")[0] for name in export.skipped}
    assert kept == ({"lm_head", "model.layers.1"} if "bf16_last_layers" in fp8 else {"lm_head"})


def test_training_starts_from_a_converted_folder(corpus: Path, start_model: Path, tmp_path: Path) -> None:
    """From the folder and from the checkpoint made of it: the same losses to the last bit."""
    convert_model(str(start_model), tmp_path / "dcp", "dcp")
    small = {"train.steps": 2, "optim.decay_steps": 0, "train.eval_every": 0}
    starts: dict[str, dict[str, Any]] = {"hf": {}, "dcp": {"init.checkpoint": str(tmp_path / "dcp")}}
    starts["dcp"]["init.keep_optimizer"] = False
    losses = []
    for name, changes in starts.items():
        run = tmp_path / name / "run"
        run.parent.mkdir(exist_ok=True)
        path = write_recipe(tmp_path / f"{name}.toml", run, corpus, start_model, **small, **changes)
        assert main(["cpt", str(path)]) == 0
        losses.append([line["loss"] for line in metrics_lines(run)])
    assert losses[0] == losses[1]


def test_a_converted_folder_has_no_moments_to_keep(
    corpus: Path, start_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert_model(str(start_model), tmp_path / "dcp", "dcp")
    changes = {"init.checkpoint": str(tmp_path / "dcp"), "init.keep_optimizer": True}
    path = write_recipe(tmp_path / "r.toml", tmp_path / "run", corpus, start_model, **changes)
    for words in ([], ["--dry-run"]):
        capsys.readouterr()
        assert main(["cpt", str(path), *words]) == 2
        assert capsys.readouterr().err == (
            f"infir2: error: {tmp_path}/dcp: has no optimiser state to keep: it was made by `infir2 convert`; "
            "set init.keep_optimizer = false\n"
        )
    assert not (tmp_path / "run").exists()


def test_a_converted_folder_is_no_run_and_no_hugging_face_folder(
    corpus: Path, start_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dcp = tmp_path / "dcp"
    convert_model(str(start_model), dcp, "dcp")
    path = write_recipe(tmp_path / "r.toml", tmp_path / "run", corpus, start_model)
    before = sorted(dcp.rglob("*"))
    for words, message in (
        (("--run", str(dcp)), f"{dcp}: was made by `infir2 convert --to dcp`, for runs to start from; give another"),
        (("--model.path", str(dcp)), f"model.path: {dcp}: holds a training checkpoint, which init.checkpoint takes"),
    ):
        for more in ([], ["--dry-run"]):
            assert main(["cpt", str(path), *words, *more]) == 2
            assert capsys.readouterr().err.startswith(f"infir2: error: {message}"), words
    assert sorted(dcp.rglob("*")) == before


def test_an_fp8_folder_to_train_from(
    corpus: Path, start_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused as it is, by naming the command that helps; that command's output is taken."""
    fp8, run = tmp_path / "fp8", tmp_path / "run"
    convert_model(str(start_model), fp8, "fp8")
    capsys.readouterr()
    path = write_recipe(tmp_path / "r.toml", run, corpus, fp8, **{"train.steps": 1, "optim.warmup_steps": 0})
    words = ["cpt", str(path), "--optim.decay_steps", "0", "--train.eval_every", "0"]
    assert main(words) == 2
    assert f"make such a folder with `infir2 convert {fp8} OUT --to hf`" in capsys.readouterr().err
    convert_model(str(fp8), tmp_path / "bf16")
    assert main([*words, "--model.path", str(tmp_path / "bf16"), "--dry-run"]) == 0


# Mistakes


def test_options_that_do_not_belong_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write_model(tmp_path / "hf"), tmp_path / "out"
    for words, message in (
        (("--to", "fp8", "--scale-format", "False"), "argument --scale-format: invalid choice: 'False'"),
        (("--to", "fp8", "--scale-dtype", "float16"), "argument --scale-dtype: invalid choice: 'float16'"),
        (("--to", "fp8", "--scale-format", "fp32", "--scale-dtype", "e8m0"), "stores powers of two only"),
        (("--scale-format", "fp32"), "--scale-format: only with --to fp8"),
        (("--to", "dcp", "--dtype", "bfloat16"), "--dtype: only with --to hf"),
        (("--max-shard-gb", "0"), "must be a number above 0"),
        (("--max-shard-gb", "inf"), "must be a number above 0"),
        (("--tokenizer", tmp_path / "nowhere"), "nowhere: no tokenizer files in it"),
    ):
        assert message in error_of(capsys, source, out, *words)
        assert not out.exists()
    file = source / "config.json"
    assert error_of(capsys, file, out).endswith(
        f"{file}: is a file; a model is a Hugging Face folder, a run or a checkpoint folder"
    )
    (out / "sub").mkdir(parents=True)
    for to in ("hf", "fp8", "dcp"):
        assert "out: exists and is not empty" in error_of(capsys, source, out, "--to", to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def test_sources_that_are_not_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write_model(tmp_path / "hf"), tmp_path / "out"
    whole = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"

    def with_weights(**changes: Tensor) -> None:
        save_file({**whole, **changes}, source / "model.safetensors")

    for to in ("hf", "fp8", "dcp"):
        save_file({key: value for key, value in whole.items() if key != name}, source / "model.safetensors")
        assert f"missing: {name}" in error_of(capsys, source, out, "--to", to)
        with_weights(more=torch.zeros(2))
        assert "unexpected: more" in error_of(capsys, source, out, "--to", to)
        with_weights(**{name: torch.zeros(128, 255)})
        assert f"{name} [128, 255] (expected [128, 256])" in error_of(capsys, source, out, "--to", to)
        with_weights(**{name: torch.zeros(128, 256, dtype=torch.int8)})
        assert f"not a plain floating-point tensor (a quantised model?): {name} I8" in error_of(
            capsys, source, out, "--to", to
        )
        with_weights(**{"lm_head.weight": torch.zeros_like(whole["model.embed_tokens.weight"])})
        assert "lm_head.weight differs from model.embed_tokens.weight" in error_of(capsys, source, out, "--to", to)
    with_weights()
    (source / "model.safetensors").rename(source / "part.safetensors")
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(whole, "../hf/part.safetensors")}))
    assert "points to '../hf/part.safetensors', which is not a plain file name" in error_of(capsys, source, out)
    index.unlink()
    assert "holds neither" in error_of(capsys, source, out)
    (source / "config.json").unlink()
    assert "config.json: missing" in error_of(capsys, source, out)
    error = error_of(capsys, tmp_path / "nowhere", out)
    assert (
        "nowhere: no such folder; a model is a Hugging Face folder, a run or a checkpoint folder. Nothing is" in error
    )
    assert "no checkpoint in it" in error_of(capsys, tmp_path, out)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_folder_that_is_already_fp8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert_model(str(write_model(tmp_path / "hf")), tmp_path / "fp8", "fp8")
    assert "is already an FP8 folder" in error_of(capsys, tmp_path / "fp8", tmp_path / "out", "--to", "fp8")
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_layer_fit_for_fp8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 6, "num_key_value_heads": 6}
    source = write_model(tmp_path / "hf", **odd)
    message = error_of(capsys, source, tmp_path / "fp8", "--to", "fp8")
    assert "none of its layers can be stored in FP8 (model.layers.0.self_attn.q_proj: shape: rows 192" in message
    assert message.endswith("take --to hf")
    assert not (tmp_path / "fp8").exists()


def test_a_damaged_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert_model(str(write_model(tmp_path / "hf")), tmp_path / "dcp", "dcp")
    step = tmp_path / "dcp/checkpoints/step-000000"
    file = max(step.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert f"{file}: damaged" in error_of(capsys, step, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def no_file_above_100_kb() -> Iterator[None]:
    """The kernel refuses to let a file grow further, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("to", ["hf", "fp8", "dcp"])
def test_no_space(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, to: str, request: Any
) -> None:
    source, out = write_model(tmp_path / "hf"), tmp_path / "out"
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 1000)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage)
        assert f"{tmp_path}: no space: 0.0 GB needed, 0.0 GB free" in error_of(capsys, source, out, "--to", to)
    request.getfixturevalue("no_file_above_100_kb")
    error = error_of(capsys, source, out, "--to", to)
    assert f"{out}: cannot be written: File too large" in error
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_what_a_killed_conversion_left_is_cleared_away(tmp_path: Path) -> None:
    out = tmp_path / "out"
    die = "import os, sys; from infir2.checkpoint.huggingface import new_folder\n"
    die += "with new_folder(sys.argv[1]) as folder: (folder / 'half').touch(); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", die, out]).returncode == -9
    assert [path.name for path in tmp_path.iterdir()] != []
    source = write_model(tmp_path / "hf")
    (tmp_path / "empty").mkdir()
    out.symlink_to(tmp_path / "empty")
    convert_model(str(source), out)
    assert tensors_in(tmp_path / "empty").keys() == tensors_in(source).keys(), "a link to an empty folder is followed"
    out.unlink()
    convert_model(str(source), out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "hf", "out"]


# Memory

MEASURE = """
import sys
from pathlib import Path
from infir2.stages.convert import convert_model
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
small, work, steps = sys.argv[1], Path(sys.argv[2]), [step.split() for step in sys.argv[3:]]
for start, out, to in steps:
    first = small if start == "hf" else work / f"{start}-small"
    convert_model(str(first), work / f"{out}-small", to)  # imports, and the allocator's own memory
for start, out, to in steps:
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    convert_model(str(work / start), work / out, to)
    print(status("VmHWM") - before)
"""


@pytest.mark.slow
def test_peak_memory_is_a_few_tensors(tmp_path: Path) -> None:
    """Five tensors of 34 MB (of 67 MB in a checkpoint) in the model; at no time more than three in memory."""
    shape: dict[str, Any] = {"intermediate_size": 32_768, "hidden_size": 512, "vocab_size": 32_768}
    shape |= {"num_hidden_layers": 1, "head_dim": 128, "tie_word_embeddings": False}
    source, small = bf16_model(tmp_path / "hf", **shape), write_model(tmp_path / "small")
    steps = {"hf fp8 fp8": 2, "fp8 bf16 hf": 2, "hf dcp dcp": 4, "dcp back hf": 4}
    done = subprocess.run([sys.executable, "-c", MEASURE, small, tmp_path, *steps], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peaks = [int(line) for line in done.stdout.splitlines()]
    tensors = {step: peak / (32_768 * 512 * width) for (step, width), peak in zip(steps.items(), peaks, strict=True)}
    assert max(tensors.values()) < 3.6, tensors  # three, and what the allocator keeps
    print(tensors)
    assert_same_tensors(tensors_in(tmp_path / "back"), tensors_in(source))
    values, rounded = tensors_in(tmp_path / "bf16"), tensors_in(source)
    assert values.keys() == rounded.keys()
    assert open_model_source(str(tmp_path / "back")).architecture == dataclasses.replace(ARCHITECTURE, **shape)
