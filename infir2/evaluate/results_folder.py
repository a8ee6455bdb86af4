"""The folder of an evaluation: OUT/eval.json with the figures, OUT/MODEL/TASK.jsonl with the samples of a task, and
beside them TASK.json, which says what they were made from.

So an evaluation that is asked for again goes on after the tasks that are finished, more tasks of the same models join
those that are there, and another evaluation is refused before it replaces anything.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infir2.durable import write_output
from infir2.errors import UserError
from infir2.evaluate.score import Sample
from infir2.evaluate.tasks import Problem

_LONGEST_NAME = 200
"""Bytes; file systems take 255, and endings follow."""
_ANOTHER = "give another --out, or move it away"


@dataclass(frozen=True)
class Origin:
    """What decides about the samples of one task of one model."""

    name: str
    """The model's, as OUT has it."""
    file: str
    """The task's file in OUT/NAME, without its ending."""
    model: dict[str, Any]
    """The same for all tasks of a model: its weights, how it is run, the seed."""
    task: dict[str, Any]
    """Task, problems, and how responses are drawn."""


def problems_digest(problems: Sequence[Problem]) -> str:
    """Changes when a problem does."""
    rows = [[problem.id, list(problem.messages), problem.label] for problem in problems]
    return _sha256(json.dumps(rows, sort_keys=True, default=repr).encode())


def file_name(name: str) -> str:
    """A name that can stand in a folder, its end where it is too long for one."""
    plain = "".join(character if character.isalnum() or character in "-_." else "-" for character in name)
    return plain.encode()[-_LONGEST_NAME:].decode(errors="ignore").strip(".-") or "unnamed"


def distinct_names(names: Sequence[str]) -> list[str]:
    """Each name, with a number behind it where it has been given out before: also where a file system does not tell
    capital letters from small ones."""
    given: dict[str, str] = {}
    for name in names:
        found, number = name, 1
        while found.casefold() in given:
            number += 1
            found = f"{name}-{number}"
        given[found.casefold()] = found
    return list(given.values())


class ResultsFolder:
    """``program`` says what runs (commit, device, versions): samples of another one are not taken over."""

    def __init__(self, out: Path, program: dict[str, Any]) -> None:
        self.out, self.program = out, json.loads(json.dumps(program))
        self.figures = out / "eval.json"

    def samples_file(self, origin: Origin) -> Path:
        return self.out / origin.name / f"{origin.file}.jsonl"

    def check(self, origins: Sequence[Origin]) -> None:
        """Raise UserError where the folder holds results of other models, weights, problems or settings."""
        names = list(dict.fromkeys(origin.name for origin in origins))
        there = [str(model["name"]) for model in self._figures().get("models", [])]
        if there and there != names:
            raise UserError(f"{self.figures}: is about {', '.join(there)}, not {', '.join(names)}; {_ANOTHER}")
        for origin in origins:
            samples, own = self.samples_file(origin), self._record_file(origin)
            if samples.exists() and not own.exists():
                raise UserError(f"{samples}: there is no record beside it of what it was made from; {_ANOTHER}")
            for file in sorted((self.out / origin.name).glob("*.json")):
                record = _read(file)
                _require_same(file, record.get("model"), origin.model)
                if file == own:
                    _require_same(file, record.get("task"), origin.task)

    def finished(self, origin: Origin) -> list[Sample] | None:
        """The samples of a task that was finished before, by the same program; call ``check`` first."""
        try:
            record = json.loads(self._record_file(origin).read_bytes())
            content = self.samples_file(origin).read_bytes()
            if record["program"] != self.program or record["sha256"] != _sha256(content):
                return None
            return [Sample(**json.loads(line)) for line in content.split(b"\n")[:-1]]
        except FileNotFoundError:
            return None

    def write(self, origin: Origin, samples: Sequence[Sample]) -> None:
        """Keep the samples of a task. Raises UserError where that cannot be."""
        text = "".join(json.dumps(sample.__dict__, ensure_ascii=False) + "\n" for sample in samples)
        # Servers send halves of surrogate pairs, which UTF-8 does not have: like this they become JSON's escapes.
        content = text.encode(errors="backslashreplace")
        record = {"model": origin.model, "task": origin.task, "program": self.program, "sha256": _sha256(content)}
        # In this order: samples never lie there without a record, and a record without its samples counts for nothing.
        _write(self._record_file(origin), json.dumps(record, indent=1) + "\n")
        _write(self.samples_file(origin), content.decode())

    def write_figures(self, content: dict[str, Any]) -> None:
        """Write eval.json; figures of other tasks that are there stay. Raises UserError where that cannot be."""
        _write(self.figures, json.dumps(_joined(self._figures(), content), indent=1) + "\n")

    def _record_file(self, origin: Origin) -> Path:
        return self.samples_file(origin).with_suffix(".json")

    def _figures(self) -> dict[str, Any]:
        return _read(self.figures) if self.figures.exists() else {}


def _joined(earlier: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Both evaluations of the same models as one: what is told now counts, about tasks that are not told what was."""
    if not earlier:
        return now
    joined = {**now, "settings": {**earlier["settings"], **now["settings"]}}
    joined["models"] = [
        {**new, "tasks": {**old["tasks"], **new["tasks"]}} for old, new in zip(earlier["models"], now["models"])
    ]
    pairs = {task: pair for task, pair in _pairs(earlier).items() if task not in now["settings"]} | _pairs(now)
    if pairs:
        joined["paired"] = {**earlier.get("paired", {}), **now.get("paired", {}), "tasks": pairs}
    return joined


def _pairs(figures: dict[str, Any]) -> dict[str, Any]:
    return figures.get("paired", {}).get("tasks", {})


def _require_same(file: Path, there: Any, wanted: dict[str, Any]) -> None:
    there = there if isinstance(there, dict) else {}
    for key, value in json.loads(json.dumps(wanted)).items():
        if there.get(key) != value:
            was, now = (str(one)[:40] for one in (there.get(key), value))
            raise UserError(f"{file}: was made with another {key.replace('_', '-')}: {was}, now {now}; {_ANOTHER}")


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}; {_ANOTHER}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: is not of an evaluation; {_ANOTHER}")
    return found


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    write_output(path, text)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
