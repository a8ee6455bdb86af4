"""Fixtures that several files of unit tests share: a sandbox with a file to hide from it."""

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

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
