"""What goes wrong at the start of `infir2 cpt`: told in one line, and nothing is written."""

import json
import os
import re
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from small_cpt import cpt, error_of
from small_run import metrics_lines, write_model

from infir2.data import dataset
from infir2.data.megatron import TokenWriter
from infir2.data.tokenizer import load_tokenizer, train_tokenizer

Recipe = Callable[..., tuple[Path, Path]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--optim.lrr", "1"), "optim.lrr: unknown key. Did you mean 'lr'?"),
        (("--optim.lr", "fast"), "optim.lr: input should be a valid number"),
        (("--train.micro_batch", "3"), "train.global_batch (4) is not a multiple of train.micro_batch (3)"),
        (("--optim.warmup_steps", "9"), "exceed train.steps (8)"),
        (("--model.preset", "tiny", "--model.path", "x"), "exactly one of model.preset and model.path"),
        (("--data.seq_len", "129"), "data.seq_len: 129 tokens exceed the model's max_position_embeddings (128)"),
        (("--data.sources", "{ '/nowhere/x' = 1.0 }"), "data.sources: /nowhere/x: there is neither a folder"),
        (("--model.path", "/nowhere/model"), "/nowhere/model: no such model folder"),
        (("--model.path", "x" * 300), "xxx: no such model folder"),
        (("--data.sources", f"{{ {'x' * 300} = 1.0 }}"), "xxx: there is neither a folder"),
        (("--parallel.replicate", "2"), "parallel.replicate (2) does not divide the 1 process(es)"),
        (("--data.sources", "{}"), "data.sources: dictionary should have at least 1 item"),
        (("--data.sources", "{ x = inf }"), "data.sources.x: input should be a finite number"),
        (("--train.seed", str(2**63)), "train.seed: input should be less than 9223372036854775808"),
        (("--optim.lr", "inf"), "optim.lr: input should be a finite number"),
        (("--optim.clip", "nan"), "optim.clip: input should be a finite number"),
        (("--run", ""), "run: string should have at least 1 character"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_mistakes_are_told_in_one_line_before_anything_is_written(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str, dry_run: bool
) -> None:
    path, run = recipe()
    assert said in error_of(capsys, path, *words, *(["--dry-run"] if dry_run else []))
    assert not run.exists()


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_vocabulary_too_small_for_the_data(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path, corpus: Path, dry_run: bool
) -> None:
    small = write_model(tmp_path / "small", vocab_size=128)
    path, run = recipe()
    words = ["--dry-run"] if dry_run else []
    message = error_of(capsys, path, "--model.path", str(small), *words)
    assert f"{corpus}: made with a tokenizer of 256 tokens, but the model has 128" in message
    preset, _ = recipe("preset")
    preset.write_text(preset.read_text().replace("path =", 'preset = "tiny"\nvocab_size = 128 #'))
    assert "made with a tokenizer of 256 tokens, but the model has 128" in error_of(capsys, preset, *words)
    assert not run.exists()


def test_a_flipped_bit_in_a_shard_stops_the_run(
    recipe: Recipe, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that becomes another valid one: only the hash can tell."""
    data = shutil.copytree(corpus, tmp_path / "data")
    path, _ = recipe(**{"data.sources": {str(data): 1.0}, "train.steps": 3, "optim.schedule": "constant"})
    shard = data / "train-00000.bin"
    good = shard.read_bytes()

    def flip() -> None:
        shard.write_bytes(bytes([good[0] ^ 1]) + good[1:])

    flip()
    assert error_of(capsys, path).startswith(f"{shard}: damaged: its sha256 differs")
    shard.write_bytes(good)
    read: list[str] = []
    true = dataset.hash_file
    monkeypatch.setattr(dataset, "hash_file", lambda path, progress: read.append(path.name) or true(path, progress))
    assert cpt(path) == 0
    assert sorted(read) == ["train-00000.bin", "train-00000.idx", "validation-00000.bin", "validation-00000.idx"]
    read.clear()
    assert cpt(path, "--train.steps", "4") == 0
    assert sorted(read) == ["train-00000.idx", "validation-00000.idx"], "a .bin is read once a run"
    flip()
    assert error_of(capsys, path, "--train.steps", "5").startswith(f"{shard}: damaged: its sha256 differs")
    assert {item.name for item in data.iterdir()} == {item.name for item in corpus.iterdir()}, "nothing of ours in it"


def write_tokenizer(folder: Path, text: str) -> Path:
    train_tokenizer([text], 300, folder)
    return folder


def test_token_ids_of_another_tokenizer_are_refused(
    recipe: Recipe, corpus: Path, start_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(corpus, tmp_path / "data")
    write_tokenizer(data / "tokenizer", "abc abd abe" * 9)
    model = shutil.copytree(start_model, tmp_path / "model")
    write_tokenizer(model, "xyz xyw xyv" * 9)
    settings = {"train.steps": 2, "optim.schedule": "constant", "train.eval_every": 0}
    path, run = recipe(**settings, **{"data.sources": {str(data): 1.0}, "model.path": str(model)})
    message = error_of(capsys, path)
    assert message.startswith(f"data.sources: {data}: its token ids are not the model's: token ")
    assert f"in {data}/tokenizer and does not exist in {model}. Prepare it with --tokenizer {model}" in message
    assert error_of(capsys, path, "--dry-run") == message
    assert not run.exists()

    shutil.rmtree(data / "tokenizer")
    shutil.copytree(model, data / "tokenizer")
    more = json.loads((model / "tokenizer.json").read_text())
    more["added_tokens"].append({**more["added_tokens"][-1], "id": 290, "content": "<tool>"})
    (model / "tokenizer.json").write_text(json.dumps(more))
    assert cpt(path) == 0, "a model may know more tokens than the data use"
    assert "note:" not in capsys.readouterr().out
    assert json.loads((run / "checkpoints/step-000002/meta.json").read_text())["tokenizer"] == str(run / "tokenizer")
    assert load_tokenizer(run / "tokenizer").get_vocab().get("<tool>") is not None

    other = shutil.copytree(data, tmp_path / "other")
    write_tokenizer(other / "tokenizer", "abc abd abe" * 9)
    words = ("--init.checkpoint", str(run), "--data.sources", f"{{ '{other}' = 1.0 }}", "--run", str(tmp_path / "next"))
    assert f"in {other}/tokenizer and does not exist in {run}/tokenizer" in error_of(capsys, path, *words)


def test_an_unknown_tokenizer_is_told(recipe: Recipe, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = recipe()
    assert cpt(path, "--dry-run") == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert [line.partition(": nobody")[0] for line in told] == [
        "note: the model brings no tokenizer",
        f"note: {corpus} does not say which tokenizer made it",
    ]


def test_a_megatron_pair_needs_a_vocabulary_size(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with TokenWriter(tmp_path / "pair", 256) as writer:
        for start in range(60):
            writer.add_document((np.arange(100) * 3 + start) % 256)
    path, run = recipe(**{"train.steps": 2, "optim.warmup_steps": 0})
    path.write_text(path.read_text().replace("path =", 'preset = "tiny" #'))
    words = ("--data.sources", f"{{ '{tmp_path}/pair' = 1.0 }}")
    assert error_of(capsys, path, *words).startswith("model.vocab_size: required")
    assert "the vocabulary has 200" in error_of(capsys, path, *words, "--model.vocab_size", "200")
    assert cpt(path, *words, "--model.vocab_size", "256") == 0
    assert len(metrics_lines(run)) == 2


def test_a_start_checkpoint_that_is_not_there(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    path, run = recipe()
    words = ("--init.checkpoint", "/nowhere/x")
    told = "/nowhere/x: no checkpoint to start from: there is no such folder"
    assert error_of(capsys, path, *words) == error_of(capsys, path, *words, "--dry-run") == told
    assert not run.exists()
    assert cpt(path, *words, "--dry-run", "--data.sources", "{ '/nowhere/y' = 1.0 }") == 2
    assert told in capsys.readouterr().err, "beside all else that is missing"


def test_a_run_folder_that_cannot_be_made(recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path, run = recipe()
    run.write_text("a file is in the way")
    assert error_of(capsys, path) == f"{run}: is a file, but a folder is needed; give another --run"


def test_a_folder_of_something_else_is_no_run_folder(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path, run = recipe()
    run.mkdir()
    (run / "thesis.md").write_text("years of work")
    assert error_of(capsys, path).startswith(
        f"{run}: is not empty and no run folder (it holds thesis.md); give another"
    )
    assert [item.name for item in run.iterdir()] == ["thesis.md"]
    (run / "thesis.md").rename(run / ".hidden")
    assert cpt(path, "--train.steps", "2", "--optim.schedule", "constant") == 0, "hidden files are no content"


def test_a_package_that_will_be_missing_is_told_first(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    path, run = recipe()
    assert "needs the package wandb: pip install" in error_of(capsys, path, "--log.wandb_project", "x")
    assert not run.exists()


def test_start_weights_that_are_not_numbers_fail(
    recipe: Recipe, start_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps, both skipped: fewer than train.max_skipped_steps, but not a success."""
    model = shutil.copytree(start_model, tmp_path / "nan")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    path, run = recipe(**{"model.path": str(model), "train.steps": 2, "optim.schedule": "constant"})
    assert cpt(path) == 3
    assert "No step was good, so the weights that training starts from may hold NaN" in capsys.readouterr().err
    assert not (run / "checkpoints").exists()


def test_a_run_folder_that_cannot_remember_what_was_verified(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run = recipe()
    (run / "verified_data.json/x").mkdir(parents=True)
    (run / "run.json").touch()
    assert error_of(capsys, path).startswith(f"{run}/verified_data.json: cannot be written: Is a directory; make room")
    assert not (run / "checkpoints").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_data_that_may_not_be_read(recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path, _ = recipe(**{"data.sources": {str(tmp_path / "data"): 1.0}})
    (tmp_path / "data").mkdir(mode=0)
    assert error_of(capsys, path) == f"{tmp_path}/data: cannot be read: Permission denied"


def test_a_model_that_no_memory_holds(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], start_model: Path, tmp_path: Path
) -> None:
    large = shutil.copytree(start_model, tmp_path / "large")
    content = json.loads((large / "config.json").read_text()) | {"num_hidden_layers": 1, "intermediate_size": 2**31 - 1}
    (large / "config.json").write_text(json.dumps(content))
    path, _ = recipe(**{"model.path": str(large), "fp8.recipe": "bf16"})
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**39, limits[1]))
    try:
        message = error_of(capsys, path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert re.fullmatch(r"the model's 8\d\d,[\d,]+ parameters do not fit into the memory of this device .*", message)


def test_a_meta_json_that_is_no_checkpoints(recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path, run = recipe()
    (tmp_path / "meta.json").write_text("{}")
    words = ("--model.path", "null", "--init.checkpoint", str(tmp_path))
    assert error_of(capsys, path, *words) == f"{tmp_path}: no checkpoint to start from"
    assert not run.exists()
