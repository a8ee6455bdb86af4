"""`infir2 sft` in this process: run folder, resume, stage 2 from stage 1, rows counted, mistakes in one line."""

import json
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import loss_bits, metrics_lines, write_model, write_toml
from transformers import AutoModelForCausalLM, AutoTokenizer

from infir2 import cli
from infir2.checkpoint.folders import peek_meta
from infir2.checkpoint.state import model_state
from infir2.checkpoint.store import CheckpointStore
from infir2.config import SftConfig, load
from infir2.data import tokenizer as tok
from infir2.data.sft import SftLoader
from infir2.launch import sft_rows
from infir2.launch.chat_model import open_model
from infir2.launch.held_folder import held
from infir2.launch.model import build_model
from infir2.parallel.runtime import World

Recipe = Callable[..., tuple[Path, Path]]
WORLD = World(0, 1, torch.device("cpu"), None)


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    rng = random.Random(seed)
    with open(path, "w") as file:
        for _ in range(count):
            a, b = rng.randrange(10), rng.randrange(10)
            messages = [{"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": f"{a + b}."}]
            file.write(json.dumps({"messages": messages * rng.randint(1, 3)}) + "\n")
    return path


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a tokenizer that has a ChatML template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    write_model(folder, vocab_size=384)
    tok.train_tokenizer(["user assistant 1+2 3."] * 3, 300, folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, chat_model: Path) -> Recipe:
    """``recipe("name", **{"train.epochs": 3})`` -> (recipe file, run folder): 21 rows, 1 of them held out, 3 a step."""
    rows = write_rows(tmp_path / "rows.jsonl", 21)

    def write(name: str = "run", **overrides: Any) -> tuple[Path, Path]:
        table: dict[str, dict[str, Any]] = {
            "model": {"path": str(chat_model)},
            "fp8": {"health_every": 0},
            "data": {"train": str(rows), "max_length": 96, "max_tokens_per_gpu": 128, "validation_fraction": 0.05},
            "optim": {"lr": 2e-3, "min_lr": 2e-4, "schedule": "cosine", "warmup_fraction": 0.2, "weight_decay": 0.0},
            "train": {"epochs": 2, "global_batch": 6, "eval_every": 4, "save_every": 3},
            "log": {"tensorboard": False},
        }
        run = tmp_path / name
        return write_toml(tmp_path / f"{name}.toml", run, table, overrides), run

    return write


def sft(path: Path, *words: str) -> int:
    return cli.main(["sft", str(path), *words])


def error_of(capsys: pytest.CaptureFixture[str], path: Path, *words: str) -> str:
    capsys.readouterr()
    assert sft(path, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("infir2: error: ")


def test_dry_run_tells_and_writes_nothing(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    path, run = recipe()
    assert sft(path, "--dry-run") == 0
    told = capsys.readouterr().out
    assert "in 8 steps of 6 sequences" in told
    assert "14 of 15 linear layers converted" in told
    assert "train: 21 rows, 21 samples" in told
    assert "20 samples to train on, 1 held out; 8 steps, 4 an epoch; packing efficiency" in told
    assert not run.exists()


@pytest.mark.parametrize("form", ["hf", "fp8"])
def test_an_export_ends_its_turns_in_other_programs_too(recipe: Recipe, tmp_path: Path, form: str) -> None:
    path, run = recipe(**{"train.epochs": 1})
    assert sft(path) == 0
    assert cli.main(["convert", str(run), str(tmp_path / form), "--to", form]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / form)
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / form)
    assert ends <= set(model.generation_config.eos_token_id)
    with torch.no_grad():  # whatever it is asked, it ends its turn at once
        model.model.norm.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size, dtype=model.dtype))
        model.lm_head.bias[tokenizer.convert_tokens_to_ids("<|im_end|>")] = 1.0
    said = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=8, do_sample=False)
    assert said.shape[1] == 4


def test_the_run_folder(recipe: Recipe, chat_model: Path) -> None:
    path, run = recipe(**{"fp8.health_every": 4})
    assert sft(path, "--train.seed", "5") == 0
    names = {item.name for item in run.iterdir() if not item.name.startswith(".")}
    assert names == {"config.toml", "run.json", "metrics.jsonl", "checkpoints", "rows", "tokenizer"}
    assert load(SftConfig, run / "config.toml") == load(SftConfig, path, ["--train.seed", "5"])
    lines = metrics_lines(run)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["epoch"] for line in lines] == [n / 4 for n in range(1, 9)]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1, "it learns"
    assert [line["lr"] for line in lines[:2]] == [1e-3, 2e-3], "a fifth of the steps, rounded, is warm-up"
    assert lines[-1]["lr"] == pytest.approx(2e-4)
    assert all(0 < line["valid_tokens"] < line["processed_tokens"] for line in lines)
    assert all(line["tokens_per_s"] == line["processed_tokens"] / line["step_time_s"] for line in lines)
    assert [line["step"] for line in metrics_lines(run, "eval")] == [4, 8]
    assert [line["step"] for line in metrics_lines(run, "health")] == [1, 4, 8]
    (event,) = (line for line in metrics_lines(run, "event") if line["event"] == "data")
    assert {
        "rows": 21,
        "samples": 21,
        "dropped": 0,
        "truncated": 0,
        "bad_rows": 0,
        "held_out": 1,
    }.items() <= event.items()
    once = sum(line["processed_tokens"] for line in lines[:4])
    assert once == sum(line["processed_tokens"] for line in lines[4:]), "every row once an epoch"
    padded = sum(line["processed_tokens"] / line["packing_efficiency"] for line in lines)
    assert event["packing_efficiency"] == pytest.approx(2 * once / padded, abs=1e-4)
    kept = AutoTokenizer.from_pretrained(run / "tokenizer")
    assert tok.fingerprint(kept) == tok.fingerprint(tok.load_tokenizer(chat_model))
    assert kept.chat_template == tok.CHAT_TEMPLATE
    meta = peek_meta(run)
    assert meta is not None
    assert meta["tokenizer"] == str(run / "tokenizer")


def test_resume_in_the_middle_of_an_epoch(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, expected = recipe("whole")
    assert sft(whole) == 0
    path, run = recipe("cut")
    true = SftLoader.step

    def dying(self: SftLoader, step: int) -> list:
        if step == 6:
            raise KeyboardInterrupt
        return true(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(SftLoader, "step", dying)
        assert sft(path) == 130
        patch.undo()
        patch.setattr(
            "infir2.launch.sft_rows.tokenize", lambda *args, **options: pytest.fail("rows are kept for a resume")
        )
        assert sft(path) == 0
    assert loss_bits(run) == loss_bits(expected)
    resumes = [line["step"] for line in metrics_lines(run, "event") if line["event"] == "resume"]
    assert resumes == [3], "the second step of the first epoch of four"


def test_changed_rows_are_noticed_and_kept_rows_made_anew(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flat = {"optim.schedule": "constant", "optim.warmup_fraction": 0.0}  # or another epoch would change the past
    path, run = recipe(**{"train.epochs": 1, "train.eval_every": 0}, **flat)
    assert sft(path) == 0
    again = ("--train.epochs", "2")
    for words in (
        ("--train.seed", "9"),
        ("--data.max_length", "40"),
        ("--data.validation_fraction", "0.5"),
        ("--data.chat_template", str(jinja(tmp_path))),
    ):
        assert "other data or another order (rows, tokenizer" in error_of(capsys, path, *again, *words)
    assert "train.global_batch = 6, the recipe says 4" in error_of(capsys, path, *again, "--train.global_batch", "4")
    (run / "rows").rename(run / ".rows.preparing-of-a-killed-run")
    assert sft(path, *again, "--data.max_tokens_per_gpu", "256") == 0, "another packing of the same rows"
    assert [line["step"] for line in metrics_lines(run)] == list(range(1, 9))
    assert not list(run.glob(".rows*")), "what a killed run left of its rows does not stay"
    (run / "rows/train-tokens.npy").write_bytes(b"damaged")
    assert sft(path, "--train.epochs", "3") == 0
    for name, damaged in (("train-tokens", b""), ("train-trained", None), ("validation-tokens", None)):
        file = run / f"rows/{name}.npy"
        whole = file.read_bytes()
        flipped = whole[:-1] + bytes([whole[-1] ^ 1])
        file.write_bytes(flipped if damaged is None else damaged)
        assert sft(path, "--train.epochs", "3") == 0
        assert file.read_bytes() == whole, "made anew"
    write_rows(tmp_path / "rows.jsonl", 21, seed=8)
    assert "other data" in error_of(capsys, path, "--train.epochs", "4")


def test_a_refused_recipe_leaves_the_kept_rows(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or the mended recipe would have to tokenise them once more."""
    path, run = recipe(**{"train.epochs": 1, "train.eval_every": 0})
    assert sft(path) == 0
    kept = {file.name: (file.stat().st_ino, file.read_bytes()) for file in (run / "rows").iterdir()}
    tokenised: list[int] = []
    true = sft_rows.tokenize_rows
    monkeypatch.setattr(sft_rows, "tokenize_rows", lambda *args: tokenised.append(1) or true(*args))
    assert "other data" in error_of(capsys, path, "--data.max_length", "40")
    assert len(tokenised) == 1, "what they hold is only known then"
    for words, message in (
        (("--optim.weight_decay", "0.5"), "another recipe: optim.weight_decay"),
        (("--train.global_batch", "4"), "train.global_batch = 6"),
    ):
        assert message in error_of(capsys, path, "--data.max_length", "40", *words)
    assert len(tokenised) == 1, "told before"
    assert {file.name: (file.stat().st_ino, file.read_bytes()) for file in (run / "rows").iterdir()} == kept


def jinja(folder: Path) -> Path:
    path = folder / "other.jinja"
    path.write_text(
        tok.CHAT_TEMPLATE.replace("user", "User").replace("<|im_start|>' + message.role", "' + message.role")
    )
    return path


def test_a_run_that_is_going_on_keeps_its_rows(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    path, run = recipe(**{"train.epochs": 1})
    assert sft(path) == 0
    kept = {file.name: file.read_bytes() for file in (run / "rows").iterdir()}
    with held(run, "another process trains here", "wait"):
        assert "another process is training into this run folder" in error_of(capsys, path, "--data.max_length", "64")
    assert {file.name: file.read_bytes() for file in (run / "rows").iterdir()} == kept


def test_a_disk_that_is_full_when_rows_are_kept(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    path, run = recipe(**{"train.epochs": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        message = error_of(capsys, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    file, _, rest = message.partition(": ")
    assert Path(file).match(f"{run}/.rows.preparing-*/train-tokens.npy")
    assert rest == "cannot be written: File too large; make room or mend it, and run the same command again"
    assert list(run.iterdir()) == []
    assert sft(path) == 0


def test_stage_2_from_stage_1(recipe: Recipe, chat_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, first = recipe("one", **{"train.epochs": 1, "data.chat_template": "chatml"})
    assert sft(one) == 0
    settings = {"model.path": None, "init.checkpoint": str(first), "train.epochs": 1, "train.save_every": 2}
    settings |= {"optim.schedule": "constant", "optim.warmup_fraction": 0.0}
    two, run = recipe("two", **settings, **{"optim.lr": 1e-30, "optim.min_lr": 0.0})
    assert sft(two) == 0
    (event,) = (line for line in metrics_lines(run, "event") if line["event"] == "init")
    assert event["from"] == str(first / "checkpoints/step-000004")
    assert event["data"] == "from its beginning"
    assert [weights(first, one), weights(first, two)] == [weights(run, two)] * 2, "a rate of nothing changes nothing"
    shutil.rmtree(first)
    assert sft(two, "--train.epochs", "2") == 0, "a resume does not need stage 1 any more"
    assert [line["step"] for line in metrics_lines(run)] == list(range(1, 9))
    three, _ = recipe("three", **settings)
    assert error_of(capsys, three) == f"{first}: no checkpoint to start from: there is no such folder"
    error = error_of(capsys, three, "--init.checkpoint", str(chat_model))
    what = "it looks like a Hugging Face folder, which model.path takes"
    assert error == f"{chat_model}: no checkpoint to start from: {what}"


def test_stage_2_from_a_run_that_was_moved(recipe: Recipe, tmp_path: Path) -> None:
    one, first = recipe("one", **{"train.epochs": 1})
    assert sft(one) == 0
    moved = first.rename(tmp_path / "moved")
    other = write_model(tmp_path / "other", vocab_size=384)
    tok.train_tokenizer(["another text: 9 of 8, user assistant"] * 3, 300, other)
    assert sft(one, "--model.path", str(other), "--train.epochs", "1") == 0, "another run in its place"
    settings = {"model.path": None, "init.checkpoint": str(moved), "train.epochs": 1, "optim.schedule": "constant"}
    two, run = recipe("two", **settings)
    assert sft(two) == 0
    names = [tok.fingerprint(tok.load_tokenizer(folder / "tokenizer")) for folder in (first, moved, run)]
    assert names[0] != names[1] == names[2]


def weights(run: Path, recipe: Path) -> dict[str, list[float]]:
    """Parameters of a run's newest checkpoint, as a recipe's model reads them."""
    config = load(SftConfig, recipe, ["--run", str(run)])
    _, _, architecture = open_model(config)
    model, _ = build_model(config, architecture, WORLD)
    store = CheckpointStore(run / "checkpoints")
    store.load(store.find(str(run)), {"model": model_state(model)}, ("optim",))
    return {name: value.flatten()[:50].tolist() for name, value in model.state_dict().items()}


def test_a_validation_file_and_rows_that_are_left_out(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = write_rows(tmp_path / "held_out.jsonl", 5, seed=1)
    long = {"prompt": "1+1", "completion": "2" * 200}
    rows = [json.dumps({"messages": []}), json.dumps(long), *(tmp_path / "rows.jsonl").read_text().splitlines()]
    (tmp_path / "mixed.jsonl").write_text("\n".join(rows) + "\n")
    settings = {"data.train": str(tmp_path / "mixed.jsonl"), "data.validation": str(held_out), "train.epochs": 1}
    path, run = recipe(**settings, **{"data.max_bad_rows": "1"})
    assert sft(path) == 0
    told = capsys.readouterr().out
    assert f"1 dropped as too long, 1 bad: no_messages ({tmp_path}/mixed.jsonl:1)" in told
    (event,) = (line for line in metrics_lines(run, "event") if line["event"] == "data")
    assert (event["rows"], event["samples"], event["dropped"], event["held_out"]) == (23, 22, 1, 5)
    strict, other = recipe("strict", **settings, **{"data.max_bad_rows": "0"})
    message = error_of(capsys, strict)
    assert message.startswith(
        f"{tmp_path}/mixed.jsonl:1: no_messages: neither messages nor prompt and completion; 1 of"
    )
    assert not other.exists()
    cut, third = recipe("cut", **settings, **{"data.max_bad_rows": "1", "data.too_long": "truncate"})
    assert sft(cut) == 0
    (event,) = (line for line in metrics_lines(third, "event") if line["event"] == "data")
    assert (event["dropped"], event["truncated"]) == (0, 1)


def test_held_out_rows_that_are_trained_on_are_told(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = tmp_path / "many"
    many.mkdir()
    (many / "linked.jsonl").symlink_to(tmp_path / "rows.jsonl")
    write_rows(many / "other.jsonl", 4, seed=1)
    path, _ = recipe(**{"train.epochs": 1})
    for name, told in ((tmp_path / "rows.jsonl", True), (many, True), (many / "other.jsonl", False)):
        for words in (["--dry-run"], []):
            assert sft(path, "--data.validation", str(name), "--run", str(tmp_path / f"run-{name.stem}"), *words) == 0
            notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: data.validation")]
            assert len(notes) == told
            file = many / "linked.jsonl" if name == many else name
            assert all(f"and data.train both read {file}: held-out results" in line for line in notes)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--data.trian", "x"), "data.trian: unknown key. Did you mean 'train'?"),
        (("--data.train", "/nowhere/x.jsonl"), "data.train: /nowhere/x.jsonl: no such file or folder"),
        (("--data.max_length", "256"), "data.max_length (256) is above data.max_tokens_per_gpu (128)"),
        (("--data.max_length", "129", "--data.max_tokens_per_gpu", "256"), "data.max_length: 129 tokens exceed"),
        (("--data.max_length", "5"), "data.train: no row is left to train on: 21 rows, 21 samples, 0 tokens"),
        (("--data.too_long", "keep"), "data.too_long: input should be 'drop' or 'truncate'"),
        (("--data.tokenizer", "/nowhere"), "/nowhere: no such folder, so no tokenizer. Nothing is"),
        (("--model.path", "x" * 300), "xxx: no such folder, so no tokenizer. Nothing is"),
        (("--data.chat_template", "/nowhere.jinja"), "data.chat_template: /nowhere.jinja: cannot be read"),
        (("--data.max_bad_rows", "many"), "data.max_bad_rows: 'many' is neither a count such as 20 nor a share"),
        (("--data.validation_fraction", "0.0"), "train.eval_every: no row is held out; give data.validation or"),
        (("--optim.warmup_fraction", "0.0", "--optim.warmup_steps", "9"), "exceed train.steps (8), which follow from"),
        (("--optim.warmup_steps", "9"), "give optim.warmup_steps or optim.warmup_fraction, not both"),
        (("--train.steps", "9"), "train.steps: unknown key"),
        (("--train.epochs", "0"), "train.epochs: input should be greater than 0"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line_before_anything_is_written(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    path, run = recipe()
    assert said in error_of(capsys, path, *words)
    assert not run.exists() or list(run.iterdir()) == [run / "rows"]


@pytest.mark.parametrize("named", [True, False], ids=["beside a model section", "without one"])
def test_a_start_checkpoint_that_is_not_there_is_told_before_rows_are_tokenised(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], chat_model: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    monkeypatch.setattr("infir2.launch.sft_rows.tokenize", lambda *args, **options: pytest.fail("rows are read"))
    settings = {"init.checkpoint": "/nowhere/x", "data.tokenizer": str(chat_model)}
    path, run = recipe(**settings, **({} if named else {"model.path": None}))
    told = "/nowhere/x: no checkpoint to start from: there is no such folder"
    assert [error_of(capsys, path), error_of(capsys, path, "--dry-run")] == [told, told]
    assert not run.exists()


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("file/run", "file: is a file, but a folder is needed; give another --run"),
        ("lost", "lost: is a link that leads nowhere, but a folder is needed; give another --run"),
        (
            "/proc/run",
            "/proc/run: cannot be written: No such file or directory; give another --run",
        ),  # not even by root
        ("x" * 300, "xxx: cannot be read: File name too long"),
        ("", "command line: run: string should have at least 1 character"),
        ("a\0b", "command line: run: string should match pattern"),
    ],
)
def test_a_run_folder_that_cannot_be_made_is_told_before_rows_are_tokenised(
    recipe: Recipe,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    said: str,
) -> None:
    monkeypatch.setattr("infir2.launch.sft_rows.tokenize", lambda *args, **options: pytest.fail("rows are read"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "lost").symlink_to("/nowhere/x")
    path, _ = recipe()
    assert said in error_of(capsys, path, "--run", place)


def test_models_and_tokenizers_that_do_not_fit(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path, chat_model: Path
) -> None:
    small = write_model(tmp_path / "small", vocab_size=256)
    path, _ = recipe()
    words = ("--model.path", str(small))
    assert error_of(capsys, path, *words).startswith(f"{small}: no tokenizer: neither tokenizer.json nor")
    size = tok.vocabulary_size(tok.load_tokenizer(chat_model))
    assert f"the tokenizer has {size} tokens, but the model has 256" in error_of(
        capsys, path, *words, "--data.tokenizer", str(chat_model)
    )
    other = tmp_path / "other"
    tok.train_tokenizer(["zebra zoo zoom"] * 3, 300, other)
    message = error_of(capsys, path, "--data.tokenizer", str(other))
    assert message.startswith(f"{other}: not a tokenizer for this model: token ")
    assert f"in {chat_model}, which the model was trained with, and " in message
    none, _ = recipe("none", **{"model.path": None, "model.preset": "tiny"})
    assert error_of(capsys, none).startswith("data.tokenizer: required")
    nothing, _ = recipe("nothing", **{"model.path": None})
    assert "give exactly one of model.preset and model.path, or init.checkpoint" in error_of(capsys, nothing)
