"""A run whose watcher goes: a pipe that nobody reads any more, a terminal that is closed."""

import fcntl
import os
import pty
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_run import loss_bits, metrics_lines

pytestmark = pytest.mark.slow
Recipe = Callable[..., tuple[Path, Path]]
SETTINGS: dict[str, Any] = {"train.steps": 60, "train.save_every": 0, "train.eval_every": 0}


def command(path: Path) -> list[str]:
    return [sys.executable, "-u", "-m", "infir2", "cpt", str(path)]


def steps(run: Path) -> list[int]:
    return [line["step"] for line in metrics_lines(run, "train")]


def test_a_closed_pipe_does_not_end_the_run(recipe: Recipe) -> None:
    path, run = recipe("piped", **SETTINGS)
    process = subprocess.Popen(command(path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stderr
    while not process.stdout.readline().startswith("step 1/"):
        pass
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 0
    assert steps(run) == list(range(1, 61))
    assert (run / "checkpoints/step-000060").is_dir()


def test_a_closed_terminal_saves_and_the_next_run_goes_on(recipe: Recipe) -> None:
    path, run = recipe("alone", **SETTINGS)
    subprocess.run(command(path), check=True, capture_output=True)
    alone = loss_bits(run)
    path, run = recipe("hung_up", **SETTINGS)
    master, slave = pty.openpty()

    def own_the_terminal() -> None:
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        command(path),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        preexec_fn=own_the_terminal,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(slave)
    shown = b""
    while b"tokens/s" not in shown:
        shown += os.read(master, 1 << 16)
    os.close(master)  # the kernel sends SIGHUP to whoever has the terminal
    assert process.wait(60) == 129
    last = steps(run)[-1]
    assert 0 < last < 60
    assert (run / f"checkpoints/step-{last:06d}").is_dir()
    subprocess.run(command(path), check=True, capture_output=True)
    assert loss_bits(run) == alone
