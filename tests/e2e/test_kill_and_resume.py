"""Training killed at random moments: every loss that is ever written has the bits of the run that was left alone.

Each attempt is a fork of a server that has imported everything (0.1 s instead of 3 s a start; see killable.py), so that
fifty kills fit into a minute.
"""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import small_run
from killable import start
from small_run import loss_bits, metrics_lines

from infir2.checkpoint import manifest

Recipe = Callable[..., tuple[Path, Path]]
KILLS, SIGTERMS = 50, 10
STEPS = 24
SETTINGS: dict[str, Any] = {
    "model.dtype": "bfloat16",
    "fp8.recipe": "blockwise",
    "train.steps": STEPS,
    "train.save_every": 2,
    "train.eval_every": 8,
    "train.keep_checkpoints": 2,
    "train.async_save": True,
}


class End(NamedTuple):
    """How an attempt ended."""

    code: int | None
    """Exit code; None where SIGKILL came first."""
    seconds: float
    last_step: int
    """Of the last whole line in metrics.jsonl; 0 without one."""
    saving: bool
    """A checkpoint was being written."""


def attempt(path: Path, run: Path, seconds: float | None = None) -> End:
    """One start of the command, which gets SIGKILL after ``seconds`` unless it has ended before."""
    began = time.monotonic()
    process = start(path, run.with_suffix(".log"))
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
    code = process.exitcode
    unfinished = run / "checkpoints"
    saving = unfinished.exists() and any(p.name.startswith(manifest.TEMPORARY) for p in unfinished.iterdir())
    return End(None if code == -signal.SIGKILL else code, time.monotonic() - began, last_step(run), saving)


def last_step(run: Path) -> int:
    try:
        lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]
    except OSError:
        return 0
    return max((int(line.split('"step": ')[1].split(",")[0]) for line in lines), default=0)


def wipe(run: Path) -> None:
    """Begin a new run in the same folder."""
    for path in sorted(run.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_fifty_sigkills(recipe: Recipe) -> None:
    path, run = recipe("whole", **SETTINGS)
    whole = attempt(path, run)
    assert whole.code == 0, run.with_suffix(".log").read_text()
    expected = loss_bits(run)
    assert len(expected) == STEPS + STEPS // 8

    path, run = recipe("killed", **SETTINGS)
    dice, limit = random.Random(11), 0.6 * whole.seconds
    kills = finished = training_kills = saving_kills = resumed = 0
    while kills < KILLS:
        before = last_step(run)
        end = attempt(path, run, dice.uniform(0.03, 1.0) * limit)
        if end.code is None:
            kills += 1
            training_kills += 0 < end.last_step < STEPS
            saving_kills += end.saving
            resumed += before > 0 and end.last_step > 0
        else:
            assert end.code == 0, run.with_suffix(".log").read_text()
        written = metrics_lines_of_a_killed_run(run)
        assert written == expected[: len(written)], f"after {kills} kills"
        if end.code == 0:
            assert written == expected
            finished += 1
            wipe(run)
    while attempt(path, run).code is None:
        pass
    assert loss_bits(run) == expected
    finished += 1
    print(f"{kills} kills: {training_kills} in training, {saving_kills} in a save, {finished} runs finished")
    assert finished >= 3
    assert training_kills >= KILLS // 3
    assert saving_kills >= 3
    assert resumed >= KILLS // 3


def metrics_lines_of_a_killed_run(run: Path) -> list[tuple[Any, ...]]:
    """What is in metrics.jsonl, but for a torn last line."""
    if not (run / "metrics.jsonl").exists():
        return []
    text = (run / "metrics.jsonl").read_text()
    if not text.endswith("\n"):
        (run / "metrics.jsonl").write_text(text[: text.rfind("\n") + 1])
    return loss_bits(run)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sigterm_saves_the_last_finished_step(recipe: Recipe) -> None:
    path, run = recipe("whole", **SETTINGS)
    whole = attempt(path, run)
    assert whole.code == 0
    expected = loss_bits(run)
    path, run = recipe("stopped", **SETTINGS | {"train.save_every": 0})
    dice, stops, finished = random.Random(5), 0, 0
    while stops < SIGTERMS:
        goal = last_step(run) + dice.randint(1, 8)
        process = start(path, run.with_suffix(".log"))
        while last_step(run) < goal and process.is_alive():
            time.sleep(0.002)
        time.sleep(dice.uniform(0, 0.08))
        seen = last_step(run)
        process.terminate()
        process.join()
        code = process.exitcode
        stops += code == 143
        late = seen >= STEPS - 1  # in the last micro-batch there is nothing to stop any more, and after it no handler
        assert code == 143 or (late and code in (0, -signal.SIGTERM)), run.with_suffix(".log").read_text()
        assert last_step(run) <= seen + 2, "it stops in the step that it is in (a loaded machine may do one in between)"
        assert (run / f"checkpoints/step-{last_step(run):06d}").is_dir()
        if last_step(run) == STEPS:
            assert loss_bits(run) == expected
            finished += 1
            wipe(run)
        else:
            assert metrics_lines(run, "event")[-1]["event"] == "stopped"
    assert attempt(path, run).code == 0
    assert loss_bits(run) == expected
    assert finished >= 1
    print(f"{stops} SIGTERMs, {finished + 1} runs finished")


def test_a_flipped_bit_costs_one_checkpoint(recipe: Recipe) -> None:
    path, run = recipe("whole", **SETTINGS)
    assert attempt(path, run).code == 0
    expected = loss_bits(run)
    shard = run / f"checkpoints/step-{STEPS:06d}/__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 8
    shard.write_bytes(data)
    assert attempt(path, run).code == 0
    assert loss_bits(run) == expected
    events = {line["event"]: line for line in metrics_lines(run, "event")}
    assert str(shard) in events["damaged_checkpoint"]["problem"]
    assert Path(events["resume"]["from"]).name == f"step-{STEPS - 2:06d}"
    assert metrics_lines(run)[-1]["step"] == STEPS
    assert attempt(path, run).code == 0, "the damaged checkpoint was replaced"
    assert [line["event"] for line in metrics_lines(run, "event")].count("damaged_checkpoint") == 1
    assert small_run.loss_bits(run) == expected
