"""Run one stage of a pipeline as a process of its own, so that its memory ends with it."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from infir2.durable import unused_name
from infir2.launch.held_folder import wait_until_free, writing
from infir2.launch.pipeline_plan import Plan, Step, outputs

# These go on where they stopped when they are run again; what others had begun is put aside.
_RESUME = ("cpt", "sft", "rl", "compare", "eval")
_STOPPING = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1
_LONGEST_FAREWELL = 120.0
"""Seconds that a stage may take to save what it has."""


def run_step(plan: Plan, step: Step) -> int:
    """Run the stage to its end, noting start and finish; returns its exit code.

    SIGINT and SIGTERM are handed on to it. The code is then 128 + the signal even where the stage finished: the chain
    was asked to stop.
    """
    # The stage of a chain that was killed a moment ago may not have ended yet (see _end_with_parent).
    wait_until_free(step.out, _LONGEST_FAREWELL)
    if not (plan.is_started(step) and step.words[0] in _RESUME):
        with writing(plan.run):
            _put_aside(plan.run, outputs(step))
    plan.note(step, started=step.fingerprint, command=step.command_line, at=_now())
    began = time.monotonic()
    code, told = _run(command_of(step))
    if code == 0:
        plan.note(step, finished=step.fingerprint, seconds=round(time.monotonic() - began, 1))
    return 128 + told if told else code


def command_of(step: Step) -> list[str]:
    """The words that start a stage: its launcher, or this Python, and infir2."""
    launcher = list(step.launcher) or [sys.executable]
    # torchrun would take a stage's --run for an abbreviation of its own --run-path.
    by_torchrun = Path(launcher[0]).name == "torchrun" or "torch.distributed.run" in launcher
    return [*launcher, "-m", *(["--"] if by_torchrun else []), "infir2", *step.words]


def stop_code(code: int) -> int | None:
    """The exit code of a chain whose stage ended with ``code``, if that says that somebody asked it to stop."""
    return next((128 + number for number in _STOPPING if code in (128 + number, -number)), None)


def _run(command: list[str]) -> tuple[int, int]:
    """(exit code, the first signal that asked this process to stop, else 0).

    The command is the head of a process group, so that a terminal's Ctrl-C reaches it through this process alone: a
    training stage takes a second SIGINT for impatience and does not save.
    """
    process: subprocess.Popen[bytes] | None = None
    told: list[int] = []
    waiting: deque[int] = deque()  # not handed on yet

    def hand_on(number: int, frame: Any) -> None:
        told.append(number)
        waiting.append(number)
        deliver()

    def deliver() -> None:  # each signal once, though another one may come at any point of this
        while process is not None and waiting:
            with contextlib.suppress(IndexError):
                process.send_signal(waiting.popleft())

    def suspend(number: int, frame: Any) -> None:  # Ctrl-Z, which does not reach the group of the command either
        if process is not None:
            os.killpg(process.pid, signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
            os.killpg(process.pid, signal.SIGCONT)

    earlier = {number: signal.signal(number, hand_on) for number in _STOPPING}
    earlier[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, suspend)
    try:
        prepare = _end_with_parent if sys.platform == "linux" else None
        process = subprocess.Popen(command, preexec_fn=prepare, process_group=0)
        deliver()  # what came while it was being started
        return process.wait(), told[0] if told else 0
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _end_with_parent() -> None:
    """Ask the stage to stop when this process is killed, or two chains would soon write into one folder."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _put_aside(run: Path, paths: list[Path]) -> None:
    for path in paths:
        folder = run / "old"
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / path.name
        os.replace(path, unused_name(target) if target.exists() else target)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
