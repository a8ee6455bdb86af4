"""A reward of the user's own: the function ``score(response, label)`` in a Python file.

It runs in worker processes as the other rewards do: with a time limit, bounded memory and few rights. The file is code
that the user named, so it is trusted as far as a recipe is; what it is given is not.
"""

import ast
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infir2.errors import ConfigError, DataError
from infir2.reward.extract import Think, after_thinking
from infir2.reward.score import Score
from infir2.reward.workers import WorkerPool


class PythonScorer:
    """Scores by the file's ``score(response, label)``, which gets what follows the thinking and returns a number from
    0 to 1. ConfigError, when it is made, for a file that has no such function."""

    def __init__(self, file: str, think: Think = "auto", limit_s: float = 5.0, workers: int | None = None) -> None:
        check_file(file)
        self.file, self.think = file, think
        self._pool = WorkerPool(f"python:{Path(file).resolve()}", limit_s, workers)

    def score_many(self, pairs: Sequence[tuple[str, Any]]) -> list[Score]:
        """DataError for a label, or a response, at which the function raises or returns something else."""
        texts = [after_thinking(response, self.think) for response, _ in pairs]
        items = [[text or "", self._checked(label)] for text, (_, label) in zip(texts, pairs)]
        return [self._score(text, reply) for text, reply in zip(texts, self._pool.run(items) if items else [])]

    def _checked(self, label: Any) -> Any:
        try:
            json.dumps(label)
        except (TypeError, ValueError) as error:
            raise DataError(f"a label that is no JSON: {error}") from None
        return label

    def _score(self, text: str | None, reply: dict[str, Any]) -> Score:
        if "error" in reply:
            raise DataError(f"{self.file}: score(response, label) raised {reply['error']}: {reply['detail']}")
        value = reply.get("value", 0.0)
        if not 0.0 <= value <= 1.0:
            raise DataError(f"{self.file}: score(response, label) returned {value}, not a number from 0 to 1")
        if text is None:
            return Score(0.0, None, "no answer")
        return Score(value, None, "timeout" if "timeout" in reply else "scorer")

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()


def digest(file: str) -> str:
    """SHA-256 of the file and of what it imports from its folder: others may give other scores."""
    path = Path(file).resolve()  # a link's neighbours are not imported
    found = hashlib.sha256(path.read_bytes())
    for beside in sorted(_imported_files(path) - {path}):
        found.update(f"{beside.relative_to(path.parent)} {hashlib.sha256(beside.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()


def _imported_files(path: Path) -> set[Path]:
    """The modules of the file's folder that it imports, and those that they import; of a package all files."""
    found: set[Path] = set()
    names: set[str] = set()
    waiting = _imported(path)
    while waiting:
        names.add(name := waiting.pop())
        beside = (path.parent / f"{name}.py", *(path.parent / name).rglob("*.py"))
        # What cannot be imported comes and goes: an editor's copies and locks (links to nothing), ._x.py of a Mac.
        new = {file for file in beside if file.is_file() and _has_a_name(file.relative_to(path.parent))} - found
        found |= new
        waiting |= set().union(*map(_imported, new)) - names
    return found


def _has_a_name(module: Path) -> bool:
    return all(part.isidentifier() for part in module.with_suffix("").parts)


def _imported(file: Path) -> set[str]:
    """First names of what a file imports anywhere in it; nothing where it is not Python."""
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except (SyntaxError, ValueError):
        return set()
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.partition(".")[0] for name in names}


def check_file(file: str) -> None:
    """Raise ConfigError unless this is a Python file that defines ``score``. It is not run."""
    if not file.endswith(".py"):
        raise ConfigError(f"{file}: is not called .py")
    try:
        tree = ast.parse(Path(file).read_bytes(), file)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except (SyntaxError, ValueError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ConfigError(f"{file}{line}: is not Python: {getattr(error, 'msg', error)}") from None
    if not any(isinstance(node, ast.FunctionDef) and node.name == "score" for node in tree.body):
        raise ConfigError(f"{file}: defines no function score(response, label)")
