"""Fixtures that unit, e2e and torchrun tests of training share."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_run

# A failed assert in these says what it compared, as one in a test does.
pytest.register_assert_rewrite("small_cpt", "small_engine", "small_report", "tensors")
# Under nohup it is ignored, by child processes too, and training respects that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="session")
def start_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_model(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture
def recipe(tmp_path: Path, corpus: Path, start_model: Path) -> Callable[..., tuple[Path, Path]]:
    """``recipe("name", **{"train.steps": 5})`` -> (recipe file, run folder)."""

    def write(name: str = "run", **overrides: Any) -> tuple[Path, Path]:
        run = tmp_path / name
        return small_run.write_recipe(tmp_path / f"{name}.toml", run, corpus, start_model, **overrides), run

    return write
