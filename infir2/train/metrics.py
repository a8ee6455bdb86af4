"""What a run writes while it trains: metrics.jsonl (always), TensorBoard, Weights & Biases and the live line.

metrics.jsonl holds one JSON object a line, with ``kind`` (train, eval, health or event), ``step`` (how many optimiser
steps were done, so the first train line has step 1) and ``time`` (seconds since 1970). JSON has no word for numbers
that are not finite: they are the strings "NaN", "Infinity" and "-Infinity", which ``read_metrics`` turns back into
floats. A run that is killed may leave a torn last line: reading and resuming ignore it.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from infir2.durable import replace_file, unused_name
from infir2.errors import UserError
from infir2.train.live import LiveLine

KINDS = ("train", "eval", "health", "event")
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsWriter:
    """Writes the metrics of one run; with ``enabled=False`` (every rank but 0) it does nothing and touches no file.

    ``first_step`` is the number of optimiser steps already done: lines of later steps, written by a process that was
    killed after its last checkpoint, are dropped, so that no step appears twice. 0 begins the file anew; an earlier one
    that tells of a checkpoint, which must have been deleted since, is kept as metrics.1.jsonl, metrics.2.jsonl, ...

    Raises UserError when metrics.jsonl is damaged or cannot be written, or when wandb is asked for and missing.
    """

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        *,
        tensorboard: bool = True,
        wandb_project: str | None = None,
        live: bool = True,
        first_step: int = 0,
        name: str | None = None,
        enabled: bool = True,
    ) -> None:
        self.enabled = enabled
        self.newest: dict[str, float] = {}
        """The values that were logged last, by their names."""
        self._file: int | None = None
        self._live: LiveLine | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not enabled:
            return
        name = name or run_dir.name
        wandb = import_wandb() if wandb_project else None
        self.path = run_dir / "metrics.jsonl"
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            _drop_after(self.path, first_step)
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None
        if tensorboard:
            with _worded(run_dir / "tensorboard"):
                self._tensorboard = _open_tensorboard(run_dir / "tensorboard", first_step)
        if wandb is not None:
            self._wandb = _open_wandb(wandb, run_dir, wandb_project, name, first_step)
        if live:
            self._live = LiveLine(total_steps, first_step=first_step, name=name)

    def log(self, step: int, values: Mapping[str, float], kind: str = "train") -> None:
        """One line of numbers after optimiser step ``step``; kind "eval" for held-out results."""
        if not self.enabled:
            return
        numbers = {key: value if isinstance(value, int) else float(value) for key, value in values.items()}
        self.newest |= numbers
        self._write(step, kind, numbers)
        self._forward(step, "train" if kind == "train" else kind, numbers)
        if self._live and kind == "train":
            self._live.update(step, numbers)
        elif self._live:
            self._live.message(f"step {step}: " + ", ".join(f"{key} {value:.6g}" for key, value in numbers.items()))

    def health(self, step: int, layers: Mapping[str, Mapping[str, float]], summary: Mapping[str, float] = {}) -> None:
        """FP8 health of every layer: {layer: {"x_underflow": .., "x_saturated": .., "x_sqnr_db": .., "w_..": ..}}.

        ``summary`` may give fp8_underflow, fp8_saturation and fp8_sqnr_db; those left out are means over all layers.
        """
        if not self.enabled:
            return
        numbers = summarise_health(layers) | {key: float(value) for key, value in summary.items()}
        self._write(step, "health", {**numbers, "layers": {name: dict(values) for name, values in layers.items()}})
        self._forward(step, "fp8", {key.removeprefix("fp8_"): value for key, value in numbers.items()})
        if self._live:
            self._live.remember(numbers)

    def event(self, step: int, event: str, **details: Any) -> None:
        """Something that happened once: event is checkpoint, resume, skip, ...; details are strings and numbers."""
        if not self.enabled:
            return
        self._write(step, "event", {"event": event, **details})
        if self._live:
            self._live.message(" ".join([f"step {step}: {event}", *(f"{k}={v}" for k, v in details.items())]))

    def activity(self, text: str) -> None:
        """What a long step is doing just now: shown to whoever watches, written nowhere."""
        if self._live:
            self._live.activity(text)

    def sync(self) -> None:
        """Make the lines so far durable: a checkpoint that is there after a crash of the machine has its metrics."""
        if self._file is not None:
            with _worded(self.path):
                os.fsync(self._file)

    def close(self) -> None:
        """Flush and close everything. A second call does nothing; the writer cannot be used afterwards."""
        if self._live:
            self._live.close()
        if self._tensorboard is not None:
            with contextlib.suppress(OSError):  # what it could not write is in metrics.jsonl
                self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._file is not None:
            os.close(self._file)
        self.enabled, self._live, self._tensorboard, self._wandb, self._file = False, None, None, None, None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Append one whole line with as few system calls as possible, so that a kill rarely tears it."""
        if kind not in KINDS:
            raise ValueError(f"kind is one of {KINDS}, not {kind!r}")
        record = {"kind": kind, "step": step, **values, "time": round(time.time(), 3)}
        data = (json.dumps(_finite(record), allow_nan=False) + "\n").encode()
        assert self._file is not None
        with _worded(self.path):
            while data:
                data = data[os.write(self._file, data) :]

    def _forward(self, step: int, group: str, numbers: Mapping[str, float]) -> None:
        tagged = {f"{group}/{key.removeprefix(f'{group}_')}": value for key, value in numbers.items()}
        if self._tensorboard is not None:
            with _worded(self.path.with_name("tensorboard")):
                for tag, value in tagged.items():
                    self._tensorboard.add_scalar(tag, value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **tagged})


@contextlib.contextmanager
def _worded(path: Path) -> Iterator[None]:
    """Raise UserError where what belongs to ``path`` cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror or error}; make room and run the same command to resume"
        ) from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every line of a metrics.jsonl as a dict. A torn last line is left out.

    Raises UserError, naming the file and the line, when it is missing or a line is not one that MetricsWriter writes.
    """
    return [record for record, _ in _read_lines(path)]


def summarise_health(layers: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Means over all layers and operands: fp8_underflow and fp8_saturation (fractions), fp8_sqnr_db (decibels)."""
    summary = {}
    for key, suffix in (("underflow", "underflow"), ("saturation", "saturated"), ("sqnr_db", "sqnr_db")):
        found = [v for values in layers.values() for name, v in values.items() if name.endswith(f"_{suffix}")]
        finite = [value for value in found if math.isfinite(value)]
        if finite:
            summary[f"fp8_{key}"] = math.fsum(finite) / len(finite)
    return summary


def _read_lines(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    """(record, line as it is in the file) pairs."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    lines = data.split(b"\n")
    torn = lines.pop()  # what follows the last newline: nothing, unless the writer was killed in the middle of a line
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int) or record["kind"] not in KINDS:
                raise ValueError("step is not a whole number, or kind is unknown")
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and not torn:  # a crash of the machine can leave zeros and then a newline
                break
            raise UserError(f"{path}: line {number}: not a metrics line ({error}); mend or remove it") from None
        records.append((_restore(record), line))
    return records


def _drop_after(path: Path, step: int) -> None:
    """Rewrite metrics.jsonl without the lines after ``step``, in one rename. Step 0 keeps nothing in it."""
    if not path.exists():
        return
    lines = _read_lines(path)
    if step == 0 and any(record.get("event") == "checkpoint" for record, _ in lines):
        path.rename(unused_name(path))
        return
    kept = [line for record, line in lines if record["step"] <= step] if step else []
    replace_file(path, b"".join(line + b"\n" for line in kept))


def _finite(value: Any) -> Any:
    """The same value with every number that JSON cannot write as a string."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return value


def _restore(value: Any) -> Any:
    if isinstance(value, str):
        return NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _restore(item) for key, item in value.items()}
    return value


def _open_tensorboard(folder: Path, first_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    # TensorBoard hides everything from purge_step on that an earlier process wrote.
    return SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else 0, flush_secs=30)


def import_wandb() -> ModuleType:
    """Raises UserError where the package is missing."""
    try:
        import wandb

        wandb.init  # noqa: B018 - a folder called wandb in the working directory also "imports", but is empty
    except (ImportError, AttributeError):
        raise UserError("log.wandb_project needs the package wandb: pip install 'infir2[wandb]'") from None
    return wandb


def _open_wandb(wandb: ModuleType, run_dir: Path, project: str | None, name: str, first_step: int) -> Any:
    """Open the run, or the same run again on resume: its id lies in the run folder."""
    remembered = run_dir / "wandb_id"
    known = remembered.read_text().strip() if first_step and remembered.exists() else None
    run = wandb.init(project=project, name=name, dir=str(run_dir), id=known, resume="allow")
    remembered.write_text(run.id)
    # With a step of our own, steps repeated after a resume are accepted; wandb's counter refuses to go back.
    run.define_metric("*", step_metric="step")
    return run
