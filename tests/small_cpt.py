"""`infir2 cpt` called in this process, for its tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from infir2 import cli
from infir2.data.loader import TokenLoader
from infir2.parallel.runtime import World

Recipe = Callable[..., tuple[Path, Path]]

WORLD = World(0, 1, torch.device("cpu"), None)


def cpt(path: Path, *words: str) -> int:
    return cli.main(["cpt", str(path), *words])


def error_of(capsys: pytest.CaptureFixture[str], path: Path, *words: str) -> str:
    """The one line on stderr of a run that a user's mistake ends."""
    capsys.readouterr()
    assert cpt(path, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("infir2: error: ")
    return line.removeprefix("infir2: error: ")


def steps_in(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The process dies (as far as the run folder can tell) before it has done ``step``."""
    true = TokenLoader.step

    def dying(self: TokenLoader, n: int, offset: int = 0) -> list:
        if n + 1 == step:
            raise KeyboardInterrupt
        return true(self, n, offset)

    monkeypatch.setattr(TokenLoader, "step", dying)
