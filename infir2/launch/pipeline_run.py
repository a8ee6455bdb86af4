"""Run one stage of a pipeline as a process of its own, so that its memory ends with it."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from infir2.durable import unused_name
from infir2.launch.pipeline_plan import Plan, Step, outputs

# These go on where they stopped when they are run again; what others had begun is put aside.
_RESUME = ("cpt", "sft", "rl", "compare", "eval")
_PR_SET_PDEATHSIG = 1


def run_step(plan: Plan, step: Step) -> int:
    """Run the stage to its end, noting start and finish; returns its exit code."""
    if not (plan.is_started(step) and step.words[0] in _RESUME):
        _put_aside(plan.run, outputs(step))
    plan.run.mkdir(parents=True, exist_ok=True)
    plan.note(step, started=step.fingerprint, command=step.command_line, at=_now())
    began = time.monotonic()
    code = _run([*(step.launcher or [sys.executable]), "-m", "infir2", *step.words])
    if code == 0:
        plan.note(step, finished=step.fingerprint, seconds=round(time.monotonic() - began, 1))
    return code


def interrupted(code: int) -> bool:
    """Whether a process that ended with this code was asked to stop."""
    return code in (130, 143, -signal.SIGINT, -signal.SIGTERM)


def _run(command: list[str]) -> int:
    """A terminal's Ctrl-C reaches the stage by itself: wait for what it does. SIGTERM is handed on."""
    process = subprocess.Popen(command, preexec_fn=_end_with_parent if sys.platform == "linux" else None)
    earlier = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue
    finally:
        signal.signal(signal.SIGTERM, earlier)


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
