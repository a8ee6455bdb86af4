"""What all scripts here do alike: a result file with its phases and clock, rows to train on, shipped recipes."""

import argparse
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from infir2.config import TrainingConfig, load
from infir2.durable import check_output, write_output
from infir2.errors import UserError
from infir2.launch.environment import environment
from infir2.train.metrics import read_metrics

RECIPES = Path(__file__).parents[1] / "recipes"
C = TypeVar("C", bound=TrainingConfig)


class Record:
    """The values of a result file, which is written anew whenever there are more (no file: only printed), and a clock.

    Ends the script where the file cannot be written, before anything is measured.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any] | None = None) -> None:
        try:
            if path:
                check_output(path, "result file")
        except UserError as error:
            raise SystemExit(f"error: {error}") from None
        self.path, self.began = path, time.monotonic()
        self.values: dict[str, Any] = {**environment(), **({"settings": settings} if settings is not None else {})}

    def save(self) -> None:
        if self.path:
            write_output(self.path, json.dumps(self.values, indent=1) + "\n")

    def tell(self, what: str) -> None:
        print(f"[{time.monotonic() - self.began:.0f} s] {what}", flush=True)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase, into ``seconds``, and write what is known at its end."""
        began, seconds = time.monotonic(), self.values.setdefault("seconds", {})
        self.tell(f"{name} ...")
        yield
        seconds[name] = round(time.monotonic() - began, 1)
        self.save()
        self.tell(f"{name}: {seconds[name]} s")


def settings_of(options: argparse.Namespace, *without: str) -> dict[str, Any]:
    """What the figures depend on: all options but some."""
    return {key: value for key, value in vars(options).items() if key not in without}


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A .jsonl file, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def override_words(values: Mapping[str, object]) -> list[str]:
    """As on the command line."""
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def shipped(kind: type[C], name: str, values: Mapping[str, object]) -> C:
    """A shipped recipe with values written over it."""
    return load(kind, RECIPES / f"{name}.toml", override_words(values))


def train_lines(run: Path) -> list[dict[str, Any]]:
    """A run's lines of training steps; of a step that was done twice, the last. None before there are any."""
    path = run / "metrics.jsonl"
    lines = [line for line in read_metrics(path) if line["kind"] == "train"] if path.exists() else []
    return list({line["step"]: line for line in lines}.values())
