"""metrics.jsonl through writing, killing and resuming; TensorBoard read back; the live line on both kinds of stream."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from infir2.errors import UserError
from infir2.train.live import LiveLine, count, duration
from infir2.train.metrics import MetricsWriter, read_metrics, summarise_health


def writer_for(folder: Path, **options: object) -> MetricsWriter:
    return MetricsWriter(folder, 100, **{"tensorboard": False, "live": False, **options})


def write_steps(folder: Path, first: int, last: int, **options: object) -> None:
    with writer_for(folder, first_step=first, **options) as writer:
        for step in range(first + 1, last + 1):
            writer.log(step, {"loss": 1 / 3 + step})


def test_values_come_back_bit_for_bit_and_every_line_is_strict_json(tmp_path: Path) -> None:
    values = {"loss": 0.1 + 0.2, "lr": 1e-300, "tokens": 2**62, "grad_norm": math.inf, "mfu": -math.inf, "z": math.nan}
    with writer_for(tmp_path) as writer:
        writer.log(1, values)
        writer.event(1, "checkpoint", path="checkpoints/step-000001")
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 2, "every line is on disk at once"

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(lines[0], parse_constant=refuse)["grad_norm"] == "Infinity"
    train, event = read_metrics(tmp_path / "metrics.jsonl")
    assert (train["kind"], train["step"], event["kind"], event["event"]) == ("train", 1, "event", "checkpoint")
    assert math.isnan(train["z"])
    assert {key: train[key] for key in values if key != "z"} == {key: values[key] for key in values if key != "z"}


def test_resume_drops_the_steps_that_will_be_repeated(tmp_path: Path) -> None:
    with writer_for(tmp_path) as writer:
        for step in range(1, 11):
            writer.log(step, {"loss": step})
            if step % 5 == 0:
                writer.log(step, {"eval_loss": step}, kind="eval")
                writer.health(step, {"layer": {"x_underflow": 0.5}})
    write_steps(tmp_path, 5, 7)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6, 7]
    assert [(line["kind"], line["step"]) for line in lines if line["kind"] != "train"] == [("eval", 5), ("health", 5)]
    write_steps(tmp_path, 0, 1)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1], "step 0 begins anew"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("cut", [1, 9, 25])
def test_a_torn_last_line_is_forgotten(cut: int, tmp_path: Path) -> None:
    write_steps(tmp_path, 0, 4)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    write_steps(tmp_path, 3, 5)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5]


def test_a_damaged_line_is_named_and_the_file_kept(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, 4)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for damage in ("{\n", "[1]\n", '{"step": 2}\n', '{"kind": "train", "step": "2"}\n', "\x00\x00\n"):
        path.write_text("".join([lines[0], damage, *lines[2:]]))
        with pytest.raises(UserError, match=r"metrics\.jsonl: line 2: not a metrics line"):
            writer_for(tmp_path, first_step=3)
        assert len(path.read_text().splitlines()) == 4


def test_a_killed_writer_leaves_a_file_that_resumes(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from infir2.train.metrics import MetricsWriter\n"
        "w = MetricsWriter(Path(sys.argv[1]), 10**6, tensorboard=False, live=False)\n"
        "print('ready', flush=True)\n"
        "for step in range(1, 10**6): w.log(step, {'loss': step / 7, 'pad': 1e-9})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    while not (tmp_path / "metrics.jsonl").exists() or (tmp_path / "metrics.jsonl").stat().st_size < 100_000:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > 500
    write_steps(tmp_path, 500, 502)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 503))


def test_other_ranks_touch_nothing(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "run", 10, wandb_project="absent", enabled=False) as writer:
        writer.log(1, {"loss": 1.0})
        writer.health(1, {})
        writer.event(1, "skip")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    writer = writer_for(tmp_path)
    assert writer._file is not None
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer._file)
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written: No space left on device; make room"):
        writer.log(1, {"loss": 1.0})
    os.close(full)
    writer.close()
    writer.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_too_full_for_tensorboard_is_one_clear_line(tmp_path: Path) -> None:
    def write() -> None:
        with MetricsWriter(tmp_path, 10, live=False) as writer:
            writer._tensorboard.flush()
            (events,) = (tmp_path / "tensorboard").iterdir()
            events.unlink()
            events.symlink_to("/dev/full")
            for step in range(1, 1000):
                writer.log(step, {"loss": 1.0})

    with pytest.raises(UserError, match="tensorboard: cannot be written: No space left on device; make room"):
        write()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) >= 1


def test_unwritable_folder_and_missing_wandb_are_user_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run/metrics\.jsonl: cannot be written: Not a directory"):
        writer_for(tmp_path / "file" / "run")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'infir2\[wandb\]'"):
        writer_for(tmp_path / "run", wandb_project="p")
    assert not (tmp_path / "run").exists()


def test_wandb_run_is_continued_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, object]] = []

    def init(**options: object) -> SimpleNamespace:
        calls.append(("init", options["id"]))
        return SimpleNamespace(
            id=options["id"] or "abc123",
            define_metric=lambda *a, **k: None,
            log=lambda values: calls.append(("log", values)),
            finish=lambda: calls.append(("finish", None)),
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    write_steps(tmp_path, 0, 1, wandb_project="p")
    write_steps(tmp_path, 1, 2, wandb_project="p")
    assert [value for name, value in calls if name == "init"] == [None, "abc123"]
    assert next(value for name, value in calls if name == "log") == {"step": 1, "train/loss": 1 / 3 + 1}
    assert calls[-1] == ("finish", None)


def test_tensorboard_shows_every_step_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with writer_for(tmp_path, tensorboard=True) as writer:
        for step in range(1, 7):
            writer.log(step, {"loss": float(step)})
    with writer_for(tmp_path, tensorboard=True, first_step=4) as writer:
        for step in range(5, 8):
            writer.log(step, {"loss": 10.0 * step})
        writer.log(7, {"eval_loss": 2.5}, kind="eval")
        writer.health(7, {"layer": {"x_underflow": 0.25}})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0), (6, 60.0), (7, 70.0),
    ]  # fmt: skip
    assert events.Scalars("eval/loss")[0].value == 2.5
    assert events.Scalars("fp8/underflow")[0].value == 0.25


def test_health_is_summarised_over_layers_and_operands(tmp_path: Path) -> None:
    layers = {
        "model.layers.0.mlp.up_proj": {"x_underflow": 0.1, "w_underflow": 0.3, "x_sqnr_db": math.inf},
        "model.layers.1.mlp.up_proj": {"x_underflow": 0.2, "x_saturated": 0.5, "x_sqnr_db": 30.0},
    }
    expected = {"fp8_underflow": pytest.approx(0.2), "fp8_saturation": 0.5, "fp8_sqnr_db": 30.0}
    assert summarise_health(layers) == expected
    with writer_for(tmp_path) as writer:
        writer.health(3, layers, {"fp8_saturation": 0.75})
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["layers"] == layers
    assert line["fp8_saturation"] == 0.75


STEP = {"loss": 2.5, "lr": 1e-4, "grad_norm": 0.5, "tokens_per_s": 40_800.0, "mfu": 0.518, "peak_memory_gb": 50.2}


def test_plain_stream_gets_about_a_hundred_lines() -> None:
    stream = io.StringIO()
    live = LiveLine(1000, console=Console(file=stream, width=60))
    for step in range(1, 1001):
        live.update(step, {**STEP, "skipped": 0})
    live.message("step 1000: checkpoint [path]")
    live.close()
    lines = stream.getvalue().splitlines()
    assert 100 <= len(lines) <= 103
    assert re.match(
        r"step 1/1000 \| loss 2\.5000 \| lr 1\.00e-04 \| grad 0\.5 \| tokens/s 40\.8k \| MFU 51\.8%", lines[0]
    )
    assert lines[-2].startswith("step 1000/1000")
    assert lines[-1] == "step 1000: checkpoint [path]"
    assert "\x1b" not in stream.getvalue()
    assert "skipped" not in stream.getvalue()


def test_plain_stream_speaks_every_ten_seconds_when_steps_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("infir2.train.live.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    live = LiveLine(100_000, first_step=500, console=Console(file=stream))
    for step in range(501, 541):
        now[0] += 3.0
        live.update(step, STEP)
    shown = [int(line.split("/")[0].split()[-1]) for line in stream.getvalue().splitlines()]
    assert shown == [501, *range(505, 541, 4)]
    assert live.eta_seconds() == pytest.approx(3.0 * (100_000 - 540))


def test_terminal_gets_one_panel_that_updates_and_the_cursor_back() -> None:
    stream = io.StringIO()
    live = LiveLine(10, name="runs/a[b]", console=Console(file=stream, force_terminal=True, width=100, height=20))
    live.remember({"fp8_underflow": 0.0012, "fp8_saturation": 0.0})
    for step in range(1, 11):
        live.update(step, {**STEP, "skipped": 2})
    live.close()
    live.close()
    text = stream.getvalue()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    for words in ("runs/a[b]", "10/10", "100.0%", "ETA", "loss 2.5000", "FP8 underflow 0.12%", "skipped 2"):
        assert words in shown
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_numbers_for_people() -> None:
    assert [count(v) for v in (0, 12.34, 999, 1000, 40_812, 123_456, 4_194_304_000)] == [
        "0", "12.3", "999", "1k", "40.8k", "123k", "4.19B",
    ]  # fmt: skip
    assert [duration(v) for v in (0, 59.6, 3725, 172_799, 1e6)] == [
        "0:00:00",
        "0:01:00",
        "1:02:05",
        "47:59:59",
        "11d 13h",
    ]


def test_activity_is_told_now_and_then_and_forgotten_after_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("infir2.train.live.time.monotonic", lambda: clock[0])
    stream = io.StringIO()
    live = LiveLine(10, console=Console(file=stream, width=200))
    for second in range(31):
        clock[0] = 1000.0 + second
        live.activity(f"sampling {second}/31")
    assert stream.getvalue().splitlines() == [f"step 1/10: sampling {second}/31" for second in (10, 20, 30)]
    live.update(1, {"loss": 1.0})
    assert live.doing == ""
