"""`infir2 cpt` in this process: run folder, resume, bad input, starting points, options that must not change losses."""

import errno
import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_cpt import WORLD, cpt, error_of, interrupt_at, steps_in
from small_run import ARCHITECTURE, SEQ_LEN, loss_bits, metrics_lines, write_corpus, write_model
from torch._dynamo.utils import counters

from infir2.checkpoint.state import model_state, optimizer_state
from infir2.checkpoint.store import CheckpointStore
from infir2.config import CptConfig, load
from infir2.data.loader import TokenLoader
from infir2.errors import CheckpointError, UserError
from infir2.launch.held_folder import wait_until_free
from infir2.launch.model import build_model
from infir2.launch.run_folder import locked
from infir2.model.attention import document_attention
from infir2.stages.cpt import architecture_of
from infir2.train import step as step_module
from infir2.train.optimizer import build_optimizer, set_learning_rate
from infir2.train.step import train_step

Recipe = Callable[..., tuple[Path, Path]]


def test_dry_run_tells_and_writes_nothing(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    path, run = recipe(**{"train.activation_checkpointing": "full"})
    assert cpt(path, "--dry-run", "--optim.lr", "5e-4") == 0
    told = capsys.readouterr().out
    assert "lr = 0.0005" in told
    assert f"parameters: {ARCHITECTURE.num_parameters():,}" in told
    assert "tokens: 2,048 in 8 steps of 4 sequences" in told
    assert "14 of 15 linear layers converted" in told
    assert "together" in told
    assert not run.exists()


def test_the_run_folder(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    path, run = recipe(**{"log.tensorboard": True, "fp8.health_every": 4, "model.dtype": "bfloat16"})
    assert cpt(path, "--train.seed", "5") == 0
    assert {item.name for item in run.iterdir()} == {
        *("config.toml", "run.json", "metrics.jsonl", "tensorboard", "checkpoints", ".lock", "verified_data.json"),
    }
    assert load(CptConfig, run / "config.toml") == load(CptConfig, path, ["--train.seed", "5"])
    record = json.loads((run / "run.json").read_text())
    assert record["fp8"] == {
        "recipe": "blockwise",
        "converted": 14,
        "kept": {"lm_head": "the output head stays in bf16"},
    }
    assert record["processes"] == 1
    lines = metrics_lines(run)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1, "it learns"
    assert [line["step"] for line in metrics_lines(run, "eval")] == [4, 8]
    health = metrics_lines(run, "health")
    assert [line["step"] for line in health] == [1, 4, 8]
    assert len(health[0]["layers"]) == 14
    assert {"x_underflow", "w_sqnr_db", "g_saturated"} <= health[0]["layers"]["model.layers.0.mlp.up_proj"].keys()
    assert steps_in(run) == [4, 8]
    meta = json.loads((run / "checkpoints/step-000008/meta.json").read_text())
    assert meta["progress"] == {"step": 8, "tokens": lines[-1]["tokens"], "skipped": 0, "skipped_in_a_row": 0}

    held_out = metrics_lines(run, "eval")[-1]["eval_loss"]
    told = f"done: 8 steps, loss {lines[-1]['loss']:.4f}, held-out loss {held_out:.4f}; infir2 report {run} shows it"
    assert capsys.readouterr().out.splitlines()[-1] == told

    before = {item: item.read_bytes() for item in run.iterdir() if item.is_file()}
    assert cpt(path, "--train.seed", "5") == 0, "a finished run has nothing left to do"
    told = f"{run}: already finished (8 of 8 steps); infir2 report {run} shows it"
    assert capsys.readouterr().out.splitlines()[-1] == told
    assert {item: item.read_bytes() for item in run.iterdir() if item.is_file()} == before


def test_the_last_line_tells_of_skipped_steps(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    true, calls = step_module.cross_entropy_sum, itertools.count()
    bad = {1, 5, 7}  # two micro-batches a step: in the first, the third and the last step
    monkeypatch.setattr(
        step_module, "cross_entropy_sum", lambda *args: true(*args) * (math.inf if next(calls) in bad else 1.0)
    )
    path, run = recipe(**{"train.steps": 4, "train.eval_every": 0})
    assert cpt(path) == 0
    why = "for a non-finite loss or gradient, the last 2 among them: the weights are those of step 2"
    told = f"done: 4 steps; 3 steps were skipped {why}"
    assert capsys.readouterr().out.splitlines()[-1] == f"{told}; infir2 report {run} shows it"


def test_an_fp8_head_trains_and_changes_held_out_losses_in_no_other_way(recipe: Recipe) -> None:
    settings = {"train.steps": 1, "train.eval_every": 1, "optim.warmup_steps": 0, "optim.decay_steps": 0}
    settings |= {"model.dtype": "bfloat16", "optim.lr": 1e-12}  # the weights stay as they are
    plain, plain_run = recipe("plain", **settings)
    path, run = recipe("head", **settings, **{"fp8.head": True})
    assert cpt(plain) == cpt(path) == 0
    before, after = metrics_lines(plain_run)[0], metrics_lines(run)[0]
    assert 0 < abs(after["loss"] - before["loss"]) < 2e-3 * before["loss"]
    assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=0.05)
    assert metrics_lines(run, "eval")[0]["eval_loss"] == metrics_lines(plain_run, "eval")[0]["eval_loss"]
    kept = json.loads((run / "run.json").read_text())["fp8"]["kept"]
    assert kept == {"lm_head": "fp8.head: the loss multiplies it in FP8, all else in bf16"}


def test_profile_writes_a_trace(recipe: Recipe) -> None:
    path, run = recipe()
    assert cpt(path, "--profile") == 0
    assert [trace.name for trace in (run / "profile").iterdir()] == ["trace-from-step-000004-rank-0.json"]


def test_retention(recipe: Recipe) -> None:
    path, run = recipe(**{"train.save_every": 1, "train.keep_checkpoints": 2, "train.keep_every": 3})
    assert cpt(path) == 0
    assert steps_in(run) == [3, 6, 7, 8]


# Resume


@pytest.mark.parametrize("async_save", [True, False])
def test_resume_continues_where_the_checkpoint_was(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, async_save: bool
) -> None:
    settings = {"train.steps": 10, "train.save_every": 3, "train.eval_every": 2, "train.async_save": async_save}
    whole, expected = recipe("whole", **settings)
    assert cpt(whole) == 0
    path, run = recipe("cut", **settings)
    for step, saved in ((6, 3), (9, 6)):
        with monkeypatch.context() as patch:
            interrupt_at(patch, step)
            assert cpt(path) == 130
        assert steps_in(run)[-1] == saved
        assert [line["step"] for line in metrics_lines(run)] == list(range(1, step))
    assert cpt(path) == 0
    assert loss_bits(run) == loss_bits(expected)
    assert [line["step"] for line in metrics_lines(run)] == list(range(1, 11)), "every step once, in order"
    resumes = [line for line in metrics_lines(run, "event") if line["event"] == "resume"]
    assert [(line["step"], Path(line["from"]).name) for line in resumes] == [(3, "step-000003"), (6, "step-000006")]
    assert metrics_lines(run)[-1]["tokens"] == metrics_lines(expected)[-1]["tokens"]


def test_a_longer_run_resumes_a_finished_one(recipe: Recipe) -> None:
    constant = {"optim.schedule": "constant", "train.eval_every": 0}
    path, run = recipe(**constant)
    assert cpt(path) == 0
    assert cpt(path, "--train.steps", "11") == 0
    whole, expected = recipe("whole", **constant, **{"train.steps": 11})
    assert cpt(whole) == 0
    assert loss_bits(run) == loss_bits(expected)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (("--data.seq_len", "32"), "other data or another order (sources, weights, seq_len or seed changed)"),
        (("--train.seed", "9"), "other data or another order"),
        (("--train.global_batch", "8"), "train.global_batch = 4, the recipe says 8"),
        (("--data.sources", "{ 'OTHER' = 1.0 }"), "other data or another order"),
        (
            ("--model.path", "OTHER_MODEL"),
            "holds another model than the recipe's model section describes: num_hidden_layers 2",
        ),
        (("--model.dtype", "float32"), "was made with another recipe: model.dtype: bfloat16 -> float32. Restore it"),
        (("--fp8.recipe", "hybrid"), "was made with another recipe: fp8.recipe: blockwise -> hybrid. Restore it"),
        (("--optim.clip", "0.5"), "was made with another recipe: optim.clip: 1.0 -> 0.5. Restore it"),
        (
            ("--optim.lr", "1e-3"),
            "optim.lr: 0.002 -> 0.001, train.steps: 3 -> 5 (step 1 would have had another learning rate)",
        ),
        (("--optim.decay_steps", "3"), "optim.decay_steps: 0 -> 3, train.steps: 3 -> 5 (step 3 would have had another"),
    ],
)
def test_what_a_resume_must_not_change(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path, override: tuple[str, str], said: str
) -> None:
    path, run = recipe(**{"train.steps": 3, "optim.decay_steps": 0, "train.eval_every": 0})
    assert cpt(path) == 0
    other = write_corpus(tmp_path / "other", seed=5)
    model = write_model(tmp_path / "other_model", num_hidden_layers=1)
    value = override[1].replace("OTHER_MODEL", str(model)).replace("OTHER", str(other))
    files = {item: item.read_bytes() for item in run.rglob("*") if item.is_file()}
    message = error_of(capsys, path, "--train.steps", "5", override[0], value)
    assert said in message
    assert f"{run}/checkpoints/step-000003" in message
    assert {item: item.read_bytes() for item in run.rglob("*") if item.is_file()} == files, "nothing is touched"


def test_changes_that_a_resume_takes(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    """A longer run whose past stays the same; changes are told, written as events, and the old recipe is kept."""
    path, run = recipe(**{"train.steps": 3, "optim.decay_steps": 0, "train.eval_every": 0})
    assert cpt(path) == 0
    before = (run / "config.toml").read_bytes()
    words = ("--train.steps", "5", "--optim.decay_steps", "2", "--train.save_every", "0", "--log.every", "2")
    assert cpt(path, *words) == 0
    told = [line["change"] for line in metrics_lines(run, "event") if line["event"] == "recipe_changed"]
    expected = ["optim.decay_steps: 0 -> 2", "train.save_every: 4 -> 0", "train.steps: 3 -> 5", "log.every: 1 -> 2"]
    assert sorted(told) == sorted(expected)
    out = capsys.readouterr().out
    assert all(change in out for change in expected)
    assert (run / "config.1.toml").read_bytes() == before
    assert load(CptConfig, run / "config.toml").train.steps == 5

    decided = ("--optim.lr", "1e-3", "--train.steps", "6")
    assert "resume all the same with --train.accept_changes true" in error_of(capsys, path, *decided)
    assert cpt(path, *decided, "--train.accept_changes", "true") == 0
    assert "optim.lr: 0.002 -> 0.001" in capsys.readouterr().out
    assert metrics_lines(run)[-1]["lr"] == 1e-3
    assert (run / "config.2.toml").exists()


def test_moved_data_and_another_micro_batch_resume(recipe: Recipe, corpus: Path, tmp_path: Path) -> None:
    path, run = recipe(**{"train.steps": 3, "optim.decay_steps": 0, "train.eval_every": 0})
    assert cpt(path) == 0
    moved = shutil.copytree(corpus, tmp_path / "moved")
    words = ("--data.sources", f"{{ '{moved}' = 2.0 }}", "--train.micro_batch", "4", "--train.steps", "4")
    assert cpt(path, *words) == 0
    assert [line["step"] for line in metrics_lines(run)] == [1, 2, 3, 4]


# Mistakes


def test_an_interrupt_from_the_keyboard_has_its_own_exit_code(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run = recipe()
    true = TokenLoader.step

    def interrupting(self: TokenLoader, n: int, offset: int = 0) -> list:
        if n == 3:
            signal.raise_signal(signal.SIGINT)
        return true(self, n, offset)

    monkeypatch.setattr(TokenLoader, "step", interrupting)
    assert cpt(path) == 130
    assert f"stopped on request; run the same command to resume {run}" in capsys.readouterr().out
    assert metrics_lines(run, "event")[-1]["signal"] == "SIGINT"


def test_metrics_of_a_run_whose_checkpoints_were_deleted_are_kept(recipe: Recipe) -> None:
    path, run = recipe(**{"train.steps": 3, "optim.schedule": "constant"})
    assert cpt(path) == 0
    first = (run / "metrics.jsonl").read_bytes()
    shutil.rmtree(run / "checkpoints")
    assert cpt(path) == 0
    assert (run / "metrics.1.jsonl").read_bytes() == first
    assert [line["step"] for line in metrics_lines(run)] == [1, 2, 3]


@pytest.mark.parametrize("slow", [0.0, 2.0], ids=["done before the next save", "still writing at the next save"])
def test_the_checkpoint_event_comes_after_the_checkpoint(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, slow: float
) -> None:
    """A background save that fails is never told as a checkpoint; one that is told is on disk."""
    path, run = recipe(**{"train.steps": 6, "train.save_every": 2, "optim.schedule": "constant"})
    true = CheckpointStore._write

    def broken(self: CheckpointStore, step: int, *args: Any) -> None:
        if step == 4:
            raise CheckpointError("no room")
        true(self, step, *args)
        time.sleep(slow)

    monkeypatch.setattr(CheckpointStore, "_write", broken)
    assert cpt(path) == 2
    told = [line for line in metrics_lines(run, "event") if line["event"] == "checkpoint"]
    assert [(line["step"], line["path"]) for line in told] == [(2, f"{run}/checkpoints/step-000002")]


# Where a run starts from


def test_it_starts_from_a_hugging_face_folder(recipe: Recipe, start_model: Path) -> None:
    path, _ = recipe()
    config = load(CptConfig, path)
    model, _ = build_model(config, architecture_of(config), WORLD)
    stored = load_file(start_model / "model.safetensors")
    parameters = dict(model.named_parameters())
    assert parameters.keys() == stored.keys()
    assert all(torch.equal(parameters[name].detach(), value) for name, value in stored.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_decay_run_from_a_stable_checkpoint(recipe: Recipe) -> None:
    """Fresh schedule, kept moments, data where the stable run was: the same losses as going on by hand."""
    settings = {"model.dtype": "float32", "train.eval_every": 0}
    stable, stable_run = recipe("stable", **settings, **{"optim.decay_steps": 0, "train.steps": 5})
    assert cpt(stable) == 0
    decay = {"optim.warmup_steps": 0, "optim.decay_steps": 4, "optim.min_lr": 1e-4, "train.steps": 4}
    checkpoint = str(stable_run / "checkpoints/step-000004")
    path, run = recipe("decay", **settings, **decay, **{"init.checkpoint": checkpoint, "train.save_every": 2})
    assert cpt(path) == 0
    lines = metrics_lines(run)
    rates = [1e-4 + 1.9e-3 * (1 + np.cos(np.pi * n / 4)) / 2 for n in (1, 2, 3, 4)]
    assert [line["lr"] for line in lines] == pytest.approx(rates, rel=1e-12)

    config = load(CptConfig, path)
    model, _ = build_model(config, architecture_of(config), WORLD)
    optimizer = build_optimizer(model, config.optim)
    store = CheckpointStore(stable_run / "checkpoints")
    store.load(Path(checkpoint), {"model": model_state(model), "optim": optimizer_state(model, optimizer)})
    data = config.data
    loader = TokenLoader(data.sources, SEQ_LEN, config.train.seed, 4, 2, vocab_size=256)
    for n, line in enumerate(lines):
        set_learning_rate(optimizer, line["lr"])
        attention = lambda batch: document_attention(batch, torch.float32)  # noqa: E731
        result = train_step(model, optimizer, loader.step(4 + n), WORLD, attention, config.optim.clip)
        assert (result.loss, result.grad_norm) == (line["loss"], line["grad_norm"])
    (event,) = (line for line in metrics_lines(run, "event") if line["event"] == "init")
    assert event["from"] == checkpoint
    assert event["data"] == "continued"
    meta = json.loads((run / "checkpoints/step-000004/meta.json").read_text())
    assert (meta["data_offset"], meta["progress"]["step"]) == (16, 4)

    resumed, resumed_run = recipe("again", **settings, **decay, **{"init.checkpoint": checkpoint})
    shutil.copytree(run / "checkpoints/step-000002", resumed_run / "checkpoints/step-000002")
    assert cpt(resumed) == 0
    assert loss_bits(resumed_run) == loss_bits(run)[2:], "a resumed decay run keeps its place in the data"


def test_init_without_the_optimizer_and_with_other_data(recipe: Recipe, tmp_path: Path) -> None:
    settings = {"model.dtype": "float32", "train.eval_every": 0, "optim.decay_steps": 0}
    stable, stable_run = recipe("stable", **settings, **{"train.steps": 4})
    assert cpt(stable) == 0
    again = settings | {"train.steps": 2, "init.checkpoint": str(stable_run), "optim.warmup_steps": 0}
    kept, kept_run = recipe("kept", **again)
    fresh, fresh_run = recipe("fresh", **again, **{"init.keep_optimizer": False})
    other = write_corpus(tmp_path / "other", seed=5)
    moved, moved_run = recipe("moved", **again, **{"data.sources": {str(other): 1.0}})
    assert [cpt(path) for path in (kept, fresh, moved)] == [0, 0, 0]
    first, second = zip(loss_bits(kept_run), loss_bits(fresh_run))
    assert first[0] == first[1], "the same weights and data"
    assert second[0] != second[1], "another update"
    (event,) = (line for line in metrics_lines(moved_run, "event") if line["event"] == "init")
    assert event["data"] == "from its beginning"


# Options that must not change losses


def test_activation_checkpointing_gives_the_same_bits(recipe: Recipe) -> None:
    runs = []
    for choice in ("none", "attention", "full"):
        path, run = recipe(choice, **{"train.activation_checkpointing": choice, "fp8.health_every": 4})
        assert cpt(path) == 0
        runs.append(loss_bits(run))
    assert runs[0] == runs[1] == runs[2]


@pytest.fixture
def torch_as_it_was() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.usefixtures("torch_as_it_was")
def test_deterministic_mode_gives_the_same_bits(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    runs = []
    for name in ("one", "two"):
        path, run = recipe(name, **{"train.deterministic": True})
        assert cpt(path) == 0
        assert torch.are_deterministic_algorithms_enabled()
        runs.append(loss_bits(run))
    assert runs[0] == runs[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fp8", "checkpointing"), [("blockwise", "none"), ("rowwise", "none"), ("rowwise", "attention"), ("bf16", "full")]
)
def test_compiled_layers(recipe: Recipe, tmp_path: Path, fp8: str, checkpointing: str) -> None:
    """Really compiled, but for fused FP8, with losses close to eager's, in a run that also evaluates and measures FP8
    health."""
    model = write_model(tmp_path / "one_layer", num_hidden_layers=1)
    runs = []
    for compiled in (False, True):
        torch.compiler.reset()
        counters.clear()
        settings = {"train.compile": compiled, "fp8.recipe": fp8, "fp8.health_every": 3, "model.path": str(model)}
        settings |= {"train.activation_checkpointing": checkpointing, "data.document_attention": False}
        path, run = recipe(f"compile_{compiled}", **settings)
        assert cpt(path) == 0
        pieces = 0 if fp8 == "blockwise" or not compiled else 2
        assert counters["stats"]["unique_graphs"] == 2 * pieces, "with gradients and for evaluation"
        assert [line["step"] for line in metrics_lines(run, "health")] == ([] if fp8 == "bf16" else [1, 3, 6])
        runs.append(np.array([line["loss"] for line in metrics_lines(run)]))
    if fp8 == "rowwise" and checkpointing == "none":
        path, run = recipe("unwatched", **settings | {"fp8.health_every": 0})
        assert cpt(path) == 0
        assert [line["loss"] for line in metrics_lines(run)] == runs[1].tolist(), "watching health changes no loss"
    difference = np.abs(runs[1] / runs[0] - 1).max()
    print(f"compile {fp8} {checkpointing}: largest relative difference of a loss {difference:.1e}")
    assert difference < 2e-3


def test_a_second_process_on_the_same_run_folder_is_refused(recipe, tmp_path: Path) -> None:
    """The lock is held by another process here: a lock of this one would not refuse itself."""
    run = tmp_path / "run"
    run.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl,sys; f=open({str(run / '.lock')!r},'a'); fcntl.flock(f, fcntl.LOCK_EX);"
         "print('held', flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is training into this run folder"), locked(run, WORLD):
            pass
    finally:
        holder.communicate("")
    with locked(run, WORLD):
        pass


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with locked(tmp_path / "run", WORLD):
        assert "cannot be locked (Function not implemented)" in capsys.readouterr().out
    wait_until_free(tmp_path / "run", 10.0)
