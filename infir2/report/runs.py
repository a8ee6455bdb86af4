"""One run folder as the report sees it: series of numbers, its configuration, its environment, its summary."""

import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from infir2.errors import UserError, did_you_mean
from infir2.rl.samples import read_samples
from infir2.train.metrics import read_metrics

FINAL_FRACTION = 0.05  # the last part of a run whose mean is called the final training loss


@dataclass(frozen=True)
class Run:
    """Everything a report says about one run."""

    label: str
    path: Path
    lines: list[dict[str, Any]]
    """The lines of metrics.jsonl, oldest first."""
    config: dict[str, Any]
    """The resolved recipe; empty where the folder has none."""
    config_text: str
    """The resolved recipe as it is written in config.toml."""
    environment: dict[str, Any]
    """run.json: command, versions, device, commit, started; empty where the folder has none."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """samples.jsonl: completions that reinforcement learning wrote down, oldest first."""

    def series(self, key: str, kind: str = "train") -> tuple[np.ndarray, np.ndarray]:
        """(steps int64, values float64) of a key, without lines that lack it; values may be NaN or infinite."""
        found = [(r["step"], r[key]) for r in self.lines if r["kind"] == kind and isinstance(r.get(key), int | float)]
        found.sort(key=lambda pair: pair[0])
        return np.array([s for s, _ in found], dtype=np.int64), np.array([v for _, v in found], dtype=np.float64)

    def steps_of(self, event: str) -> list[int]:
        """The steps at which an event (resume, skip, checkpoint) was recorded."""
        return [r["step"] for r in self.lines if r["kind"] == "event" and r.get("event") == event]

    def health(self) -> tuple[int, dict[str, dict[str, float]]] | None:
        """(step, layers) of the last FP8 health measurement."""
        found = [r for r in self.lines if r["kind"] == "health" and r.get("layers")]
        return (found[-1]["step"], found[-1]["layers"]) if found else None

    @property
    def model(self) -> str | None:
        section = self._section("model")
        source = section.get("preset") or section.get("path")
        return Path(source).name if source else None

    @property
    def precision(self) -> str | None:
        section = self._section("fp8")
        if section.get("recipe") in (None, "bf16"):
            return "BF16" if section else None
        return f"FP8 {section['recipe']}"

    def _section(self, name: str) -> dict[str, Any]:
        section = self.config.get(name)
        return section if isinstance(section, dict) else {}

    def last(self, key: str, kind: str = "train") -> float | None:
        _, values = self.series(key, kind)
        return float(values[-1]) if len(values) else None

    def middle(self, key: str) -> float | None:
        """Median of the finite values: one slow step (compilation, a save) does not move it."""
        _, values = self.series(key)
        finite = values[np.isfinite(values)]
        return float(np.median(finite)) if len(finite) else None

    def highest(self, key: str) -> float | None:
        _, values = self.series(key)
        return float(np.nanmax(values)) if len(values) and not np.isnan(values).all() else None

    def time_in_steps(self) -> float:
        """Seconds of all steps; those between two lines (``log.every``) count as the one that was written down."""
        steps, seconds = self.series("step_time_s")
        return float(np.nansum(seconds * np.diff(steps, prepend=0)))

    def final_loss(self) -> float | None:
        """Mean training loss over the last 5 % of the steps, without those that were skipped; NaN where all were."""
        steps, values = self.series("loss")
        tail = values[steps > steps[-1] * (1 - FINAL_FRACTION)] if len(steps) else values
        finite = tail[np.isfinite(tail)]
        return float(np.mean(finite)) if len(finite) else math.nan if len(tail) else None


def read_run(path: Path, label: str) -> Run:
    """Read a run folder. Raises UserError, naming the file (and the line), where it is missing or broken."""
    if not path.is_dir():
        beside = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such run folder.{did_you_mean(path.name, beside)}")
    if not (path / "metrics.jsonl").exists():
        inside = sorted(found.parent.name for found in path.glob("*/metrics.jsonl"))
        hint = f"; these folders in it have one: {', '.join(inside[:8])}" if inside else ""
        raise UserError(f"{path}: not a run folder: training writes metrics.jsonl into one, and there is none{hint}")
    lines = read_metrics(path / "metrics.jsonl")
    for number, line in enumerate(lines, start=1):
        loss = line.get("loss", math.nan)
        if line["kind"] == "train" and not isinstance(loss, int | float):
            raise UserError(f"{path / 'metrics.jsonl'}: line {number}: loss is {loss!r}, not a number")
    if not any(line["kind"] == "train" for line in lines):
        raise UserError(f"{path / 'metrics.jsonl'}: holds no training step yet")
    config, text = _read_config(path / "config.toml")
    return Run(label, path, lines, config, text, _read_environment(path / "run.json"), read_samples(path))


def labels_for(paths: Sequence[Path], labels: Sequence[str] | None) -> list[str]:
    """The labels given, or the folders' names, made longer from the left until they differ."""
    if labels:
        if len(labels) != len(paths):
            raise UserError(f"--labels: {len(labels)} labels for {len(paths)} runs")
        return list(labels)
    whole = [path.resolve() for path in paths]
    for parts in range(1, max(len(path.parts) for path in whole) + 1):
        names = ["/".join(path.parts[-parts:]) for path in whole]
        if len(set(names)) == len(names):
            return names
    raise UserError("the same run folder is named twice")


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Configuration keys whose values differ between runs, with each run's value as text; the run's name left out."""
    flat = [_flatten(run.config) for run in runs]
    keys = sorted(set().union(*flat) - {"run"})
    rows = [(key, [json.dumps(table[key]) if key in table else "not set" for table in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _read_config(path: Path) -> tuple[dict[str, Any], str]:
    if not path.exists():
        return {}, ""
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text), text
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None


def _read_environment(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        environment = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(environment, dict):
        raise UserError(f"{path}: expected a JSON object")
    return environment
