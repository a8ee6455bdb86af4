"""The folder of one training run: who may write into it, and what is written there before training starts."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infir2.config import TrainingConfig, to_toml
from infir2.errors import UserError
from infir2.fp8.convert import SwapReport
from infir2.parallel.runtime import World
from infir2.stages.environment import environment


@contextmanager
def locked(run: Path, world: World) -> Iterator[None]:
    """Hold the run folder, making it if need be, so that no second process writes into it.

    The lock is the operating system's: it ends with the process, however that ends. Raises UserError on rank 0 where
    another process holds it; the other ranks then fail at their next meeting with rank 0.
    """
    if not world.is_main:
        yield
        return
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = open(run / ".lock", "a")  # noqa: SIM115 - held open for as long as the lock is wanted
    except OSError as error:
        raise UserError(f"{error.filename or run}: cannot be written: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{run}: another process is training into this run folder; wait for it, stop it, or give another --run"
            ) from None
        yield


def describe(config: TrainingConfig, run: Path, report: SwapReport, world: World) -> None:
    """Write config.toml and run.json: what is run, by which command, on what."""
    record = {
        **environment(),
        "processes": world.size,
        "fp8": {"recipe": report.recipe, "converted": len(report.converted), "kept": report.kept},
    }
    try:
        (run / "config.toml").write_text(to_toml(config), encoding="utf-8")
        (run / "run.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error.filename or run}: cannot be written: {error.strerror}") from None
