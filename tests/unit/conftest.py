"""Fixtures that several files of unit tests share: a sandbox with a file to hide from it, recipes of `infir2 rl`."""

import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import small_rl

from infir2.reward.sandbox import Limits, Sandbox, SandboxError


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    """With small limits, so that what breaks out of a sandbox that fails does no harm."""
    try:
        return Sandbox(
            Limits(wall_s=20, cpu_s=5, memory_mib=256, processes=8, file_mib=4, folder_mib=8, output_kib=256)
        )
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file anybody may read and write, in folders anybody may enter: only the sandbox keeps the program from it."""
    file = tmp_path / "canary"
    file.write_text("canary-sings")
    file.chmod(0o666)
    folders = [folder for folder in (tmp_path, *tmp_path.parents) if str(folder).count("/") > 1]
    before = {folder: stat.S_IMODE(folder.stat().st_mode) for folder in folders}
    for folder in folders:
        folder.chmod(0o777 if folder == tmp_path else before[folder] | 0o055)
    yield file
    for folder, mode in before.items():
        folder.chmod(mode)


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_rl.write_policy(tmp_path_factory.mktemp("policy") / "hf")


@pytest.fixture
def rl_recipe(tmp_path: Path, policy: Path) -> Callable[..., tuple[Path, Path]]:
    """``rl_recipe("name", **{"train.steps": 5})`` -> (recipe file, run folder)."""
    prompts = small_rl.write_prompts(tmp_path / "prompts.jsonl")

    def write(name: str = "run", **overrides: Any) -> tuple[Path, Path]:
        run = tmp_path / name
        return small_rl.write_rl_recipe(tmp_path / f"{name}.toml", run, policy, prompts, **overrides), run

    return write
