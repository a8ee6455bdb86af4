"""The folder of one training run: who may write into it, and what is written there before training starts."""

import json
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infir2.config import TrainingConfig, to_toml
from infir2.data.tokenizer import copy_tokenizer
from infir2.durable import replace_file, unused_name
from infir2.errors import UserError, some_of
from infir2.fp8.convert import SwapReport
from infir2.launch.environment import environment
from infir2.launch.held_folder import held
from infir2.parallel.runtime import World
from infir2.train.metrics import import_wandb

_OURS = (".lock", "run.json", "metrics.jsonl", "checkpoints", "rows")
"""What a run leaves in its folder, one or the other from its very beginning."""


def check_start(config: TrainingConfig, world: World) -> None:
    """Raise UserError, before anything is written, for a run folder that belongs to something else and for a package
    that will be missing."""
    if not world.is_main:
        return  # where the first process fails, so do the others
    if config.log.wandb_project:
        import_wandb()
    run = Path(config.run)
    _check_place(run)
    try:
        names = sorted(entry.name for entry in run.iterdir()) if run.is_dir() else []
    except OSError as error:
        raise UserError(f"{run}: cannot be read: {error.strerror}") from None
    visible = [name for name in names if not name.startswith(".")]
    if visible and not any(name in names for name in _OURS):
        raise UserError(
            f"{run}: is not empty and no run folder (it holds {some_of(visible)}); give another --run, or empty it"
        )


def _check_place(run: Path) -> None:
    """Raise UserError where the run folder cannot be made: what is written first may have taken hours to make."""
    there = next(place for place in (run, *run.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        what = "a file" if there.is_file() else "a link that leads nowhere"
        raise UserError(f"{there}: is {what}, but a folder is needed; give another --run")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise UserError(f"{run}: cannot be written: {error.strerror}; give another --run") from None


@contextmanager
def locked(run: Path, world: World) -> Iterator[None]:
    """Hold the run folder, making it if need be, so that no second process writes into it.

    The lock is the operating system's: it ends with the process, however that ends. Raises UserError on rank 0 where
    another process holds it; the other ranks then fail at their next meeting with rank 0.
    """
    if not world.is_main:
        yield
        return
    with held(run, "another process is training into this run folder", "give another --run"):
        yield


def exit_code(stopped: signal.Signals | None, config: TrainingConfig, world: World) -> int:
    """A training stage's exit code, as a shell would give it; tells how to go on where a signal ended the run."""
    if stopped is None:
        return 0
    if world.is_main:
        print(f"stopped on request; run the same command to resume {config.run}")
    return 128 + stopped


def keep_tokenizer(source: Path | None, run: Path, template: str | None = None) -> None:
    """Copy the tokenizer that a model is trained with to run/tokenizer, where its checkpoints name it, and write the
    chat template there."""
    folder = run / "tokenizer"
    if source is not None and source.resolve() != folder.resolve():
        copy_tokenizer(source, folder)
    if template is not None:
        replace_file(folder / "chat_template.jinja", template.encode())


def write_run_record(config: TrainingConfig, run: Path, report: SwapReport, world: World) -> None:
    """Write config.toml and run.json: what is run, by which command, on what.

    An earlier config.toml that says something else is kept as config.1.toml, config.2.toml, ...
    """
    record = {
        **environment(),
        "processes": world.size,
        "fp8": {"recipe": report.recipe, "converted": len(report.converted), "kept": report.kept},
    }
    current, text = run / "config.toml", to_toml(config).encode()
    if current.exists() and (earlier := current.read_bytes()) != text:
        replace_file(unused_name(current), earlier)
    replace_file(current, text)
    replace_file(run / "run.json", json.dumps(record, indent=1).encode())
