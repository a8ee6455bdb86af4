"""The look at token shards before training: what was verified once is trusted for as long as it does not change."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from infir2.data.dataset import ShardFile
from infir2.errors import DataError
from infir2.launch.data_check import verify_shards
from infir2.parallel.runtime import World, world


@pytest.fixture
def here() -> World:
    with world() as single:
        return single


def shard(folder: Path, content: bytes = b"tokens") -> ShardFile:
    path = folder / "train-00000.bin"
    path.write_bytes(content)
    return ShardFile(path, len(content), hashlib.sha256(content).hexdigest())


def test_a_shard_is_read_once_and_again_when_it_changes(
    tmp_path: Path, here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    check = ShardFile.check_hash

    def counted(file: ShardFile, progress: Callable[[int], object] | None = None) -> None:
        read.append(file.path.name)
        check(file, progress)

    monkeypatch.setattr(ShardFile, "check_hash", counted)
    file = shard(tmp_path)
    verify_shards([file], tmp_path, here)
    verify_shards([file], tmp_path, here)
    assert len(read) == 1
    os.utime(file.path, ns=(0, 0))
    verify_shards([file], tmp_path, here)
    assert len(read) == 2


def test_a_shard_that_changes_while_it_is_read_is_not_trusted(
    tmp_path: Path, here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, check = shard(tmp_path), ShardFile.check_hash

    def then_damaged(file: ShardFile, progress: Callable[[int], object] | None = None) -> None:
        check(file, progress)
        file.path.write_bytes(b"t0kens")
        os.utime(file.path, ns=(0, 0))

    with monkeypatch.context() as patched:
        patched.setattr(ShardFile, "check_hash", then_damaged)
        verify_shards([file], tmp_path, here)
    with pytest.raises(DataError, match=r"train-00000\.bin: damaged"):
        verify_shards([file], tmp_path, here)
