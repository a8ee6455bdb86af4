"""The trainer loop: saving, evaluating, skips, signals, failures, traces."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_run import SEQ_LEN
from small_training import WORLD, adam, attention_for, batches, build, nan_activation, snapshot, step, windows
from tensors import same
from torch import Tensor

from infir2.config import LogSection, TrainSection
from infir2.data.packing import pack, pack_documents
from infir2.errors import TrainingStopped, UserError
from infir2.model.transformer import CausalLM
from infir2.train import step as step_module
from infir2.train.loop import Callbacks, Feed, LoopSettings, TrainState, train
from infir2.train.metrics import MetricsWriter, read_metrics
from infir2.train.peak import peak_tflops
from infir2.train.step import evaluate
from infir2.types import Batch


class Run:
    """A loop over a real model with callbacks that note what was asked of them."""

    def __init__(
        self, folder: Path, at_step: Callable[[int, CausalLM], None] = lambda step, model: None, **changes: Any
    ):
        self.model = build("blockwise")
        self.optimizer = adam(self.model)
        self.progress = TrainState()
        self.saved: list[dict[str, int]] = []
        self.finished: list[Any] = []
        self.folder, self.at_step = folder, at_step
        settings = {"steps": 6, "global_batch": 4, "eval_every": 0, "save_every": 0, "max_skipped_steps": 3} | changes
        self.config = TrainSection(**settings)

    def go(self, health_every: int = 0) -> signal.Signals | None:
        def made(first: int, last: int) -> Iterator[Sequence[Batch]]:
            for n in range(first, last + 1):
                self.at_step(n, self.model)
                yield batches(n)

        feed = Feed(lambda first, last, _: made(first, last), attention_for)
        settings = LoopSettings(self.config, lambda step: 1e-3 / step, 1.0, float, health_every=health_every)
        callbacks = Callbacks(
            evaluate=lambda _: {"eval_loss": evaluate(self.model, batches(99), WORLD, attention_for)},
            save=lambda progress: self.saved.append(progress.to_json()),
            finish=lambda: self.finished.append(signal.getsignal(signal.SIGTERM)),
        )
        with MetricsWriter(self.folder, self.config.steps, tensorboard=False, live=False) as metrics:
            return train(self.model, self.optimizer, self.progress, feed, settings, callbacks, WORLD, metrics)

    def lines(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in read_metrics(self.folder / "metrics.jsonl") if line["kind"] == kind]


def test_the_loop_saves_evaluates_and_counts(tmp_path: Path) -> None:
    run = Run(tmp_path, eval_every=4, save_every=2)
    assert run.go() is None
    assert [at["step"] for at in run.saved] == [2, 4, 6]
    assert [line["step"] for line in run.lines("eval")] == [4, 6]
    lines = run.lines("train")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["lr"] for line in lines] == [1e-3 / n for n in range(1, 7)]
    assert run.progress == TrainState(6, sum(line["valid_tokens"] for line in lines), 0, 0)
    assert lines[-1]["tokens"] == run.progress.tokens


def test_skips_are_counted_and_forgiven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = step_module.cross_entropy_sum
    bad = {2, 3, 5, 6}
    now = 0

    def note(n: int, model: CausalLM) -> None:
        nonlocal now
        now = n

    monkeypatch.setattr(
        step_module, "cross_entropy_sum", lambda *args: true(*args) * (float("inf") if now in bad else 1.0)
    )
    run = Run(tmp_path, note, steps=7)
    assert run.go() is None
    assert (run.progress.step, run.progress.skipped, run.progress.skipped_in_a_row) == (7, 4, 0)
    events = run.lines("event")
    assert [(event["step"], event["event"]) for event in events] == [(n, "skip") for n in sorted(bad)]
    assert [line["skipped"] for line in run.lines("train")] == [0, 1, 2, 2, 3, 4, 4]


def test_too_many_skips_in_a_row_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before: dict[str, Tensor] = {}

    def poison(n: int, model: CausalLM) -> None:
        if n == 3:
            nan_activation(model, monkeypatch)
            before.update(snapshot(model, torch.optim.SGD(model.parameters())))

    run = Run(tmp_path, poison)
    with pytest.raises(TrainingStopped) as stopped:
        run.go()
    message = str(stopped.value)
    assert message.startswith("step 5: 3 steps in a row had a non-finite loss or gradient (loss nan")
    assert "\n" not in message
    assert stopped.value.exit_code == 3
    assert run.progress.skipped_in_a_row == 3
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())
    assert [event["event"] for event in run.lines("event")] == ["skip"] * 3


def test_nohup_is_respected(tmp_path: Path) -> None:
    run = Run(tmp_path, lambda n, model: os.kill(os.getpid(), signal.SIGHUP) if n == 3 else None)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run.go() is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_ends_the_run(tmp_path: Path, number: signal.Signals) -> None:
    run = Run(tmp_path, lambda n, model: os.kill(os.getpid(), number) if n == 3 else None)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert run.go() == number
    assert [at["step"] for at in run.saved] == [2], "the step that had not begun is not run"
    assert [(event["event"], event["signal"]) for event in run.lines("event")] == [("stopped", number.name)]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert len(run.finished) == 1
    assert run.finished[0] != signal.SIG_DFL, "a second SIGTERM must not cut the last save short"


def signal_at_micro_batch(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """SIGTERM arrives inside a micro-batch (counted from 1 over the run); returns the list of those that were run."""
    true, done = step_module.cross_entropy_sum, []

    def killing(*args: Any) -> Tensor:
        done.append(len(done) + 1)
        if len(done) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return true(*args)

    monkeypatch.setattr(step_module, "cross_entropy_sum", killing)
    return done


def test_a_signal_between_micro_batches_drops_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, save_every=2)
    kept: list[dict[str, Tensor]] = []
    run.optimizer.register_step_post_hook(lambda *_: kept.append(snapshot(run.model, run.optimizer)))
    done = signal_at_micro_batch(monkeypatch, 5)  # two a step: the first one of the third step
    assert run.go() == signal.SIGTERM
    assert len(done) == 5, "the other micro-batch is not run"
    assert [at["step"] for at in run.saved] == [2], "saved at its time, and not again"
    assert run.progress.step == len(kept) == 2
    assert same(snapshot(run.model, run.optimizer), kept[-1])
    assert all(parameter.grad is None for parameter in run.model.parameters())
    assert [line["step"] for line in run.lines("train")] == [1, 2]


def test_a_signal_in_the_first_step_saves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signal_at_micro_batch(monkeypatch, 1)
    run = Run(tmp_path)
    assert run.go() == signal.SIGTERM
    assert run.saved == []


def test_a_signal_in_the_last_micro_batch_ends_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signal_at_micro_batch(monkeypatch, 12)
    run = Run(tmp_path)
    assert run.go() is None
    assert [at["step"] for at in run.saved] == [6]


def test_a_run_that_skips_every_step_fails(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=2)
    with torch.no_grad():
        run.model.model.norm.weight[0] = float("nan")
    with pytest.raises(TrainingStopped, match=r"No step was good, so the weights .* may hold NaN"):
        run.go()
    assert run.saved == []


@pytest.mark.parametrize(("good", "fails"), [(1, True), (2, True), (3, False)])
def test_a_run_of_which_most_is_skipped_at_the_end_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: int, fails: bool
) -> None:
    """Fewer in a row than train.max_skipped_steps, which a short run never reaches."""
    run = Run(
        tmp_path, lambda n, model: nan_activation(model, monkeypatch) if n == good + 1 else None, max_skipped_steps=10
    )
    if not fails:
        assert run.go() is None
        assert (run.saved[-1]["step"], run.progress.skipped_in_a_row) == (6, 6 - good)
        return
    with pytest.raises(TrainingStopped, match=f"^step 6: {6 - good} steps in a row .*Lower optim.lr") as stopped:
        run.go()
    assert stopped.value.exit_code == 3
    assert run.saved == []


def test_a_failure_is_raised_where_no_process_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk under metrics.jsonl: told at the next meeting of the processes, before another step is done."""

    def full(self: MetricsWriter, step: int, *args: Any, **more: Any) -> None:
        if step == 2:
            raise UserError("metrics.jsonl: cannot be written: No space left on device")

    monkeypatch.setattr(MetricsWriter, "log", full)
    run = Run(tmp_path)
    with pytest.raises(UserError, match="No space left"):
        run.go()
    assert run.progress.step == 2


def test_a_failure_in_the_last_step_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: MetricsWriter, step: int, *args: Any, **more: Any) -> None:
        if step == 6:
            raise UserError("metrics.jsonl: cannot be written: No space left on device")

    monkeypatch.setattr(MetricsWriter, "log", full)
    with pytest.raises(UserError, match="No space left"):
        Run(tmp_path).go()


# What is measured


def test_a_step_counts_its_tokens_and_attended_pairs() -> None:
    made = batches()
    model = build()
    result = step(model, adam(model), made)
    bounds = [batch.cu_seqlens.tolist() for batch in made]
    lengths = [b - a for cuts in bounds for a, b in pairwise(cuts)]
    assert sum(lengths) == result.tokens == 4 * SEQ_LEN
    assert result.attended == sum(n * (n + 1) // 2 for n in lengths)
    assert 4 * SEQ_LEN < result.attended < 4 * SEQ_LEN * (SEQ_LEN + 1) / 2
    whole = pack(windows(4), False)
    assert whole.attended == 4 * SEQ_LEN * (SEQ_LEN + 1) // 2


def test_what_fills_a_micro_batch_up_is_not_counted() -> None:
    """Else a batch that is filled up to a fixed size shows more FLOPs than were of use."""
    documents = [(np.arange(n, dtype=np.int32), np.ones(n, np.bool_)) for n in (4, 7)]
    batch = pack_documents(documents, SEQ_LEN)
    assert batch.labels.shape == (1, SEQ_LEN)
    model = build()
    result = step(model, adam(model), [batch, batch])
    assert (result.tokens, result.valid_tokens) == (2 * 9, 2 * 9)
    assert result.attended == 2 * (3 * 4 // 2 + 6 * 7 // 2)
    part = batch.beginning(12)
    assert (part.read_tokens, part.attended) == (9, batch.attended)
    assert (batch.beginning(5).read_tokens, batch.beginning(5).attended) == (5, 3 * 4 // 2 + 2 * 3 // 2)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H1000", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_peak_follows_the_form_factor(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


def test_health_does_not_change_training(tmp_path: Path) -> None:
    losses = []
    for health_every in (0, 2):
        run = Run(tmp_path / str(health_every))
        assert run.go(health_every=health_every) is None
        losses.append([(line["loss"], line["grad_norm"]) for line in run.lines("train")])
    assert losses[0] == losses[1]
    assert [line["step"] for line in run.lines("health")] == [1, 2, 4, 6]
    row = run.lines("health")[0]["layers"]["model.layers.0.mlp.up_proj"]
    assert {"x_underflow", "w_sqnr_db", "g_saturated"} <= row.keys()


def test_a_trace_is_written(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with MetricsWriter(tmp_path, 6, tensorboard=False, live=False) as metrics:
        feed = Feed(lambda first, last, _: (batches(n) for n in range(first, last + 1)), attention_for)
        settings = LoopSettings(
            run.config, lambda step: 1e-3, 1.0, float, LogSection(profile_steps=1), trace_folder=tmp_path / "profile"
        )
        train(run.model, run.optimizer, run.progress, feed, settings, Callbacks(), WORLD, metrics)
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "trace-from-step-000004-rank-0.json"
    assert "infir2::scaled_mm" in trace.read_text()
