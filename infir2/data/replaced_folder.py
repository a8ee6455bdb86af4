"""A folder that is built beside its place and takes it in one rename: the old one or the new one is there, and whole.

What a killed process leaves beside it is cleared away, or put back, by the next one.
"""

import fcntl
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infir2.durable import naming, sync_folder

_BUILDING, _REPLACED = ".preparing-", ".old-"


@contextmanager
def built_beside(out: Path) -> Iterator[Path]:
    """A new folder beside ``out`` that takes its place when the block ends well and vanishes when it does not.

    Where ``out`` is a link, the folder that it leads to is replaced.
    """
    out = Path(os.path.realpath(out))
    parent = out.parent
    parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(out)
    folder = parent / f".{out.name}{_BUILDING}{uuid.uuid4().hex[:8]}"
    with naming(parent):
        folder.mkdir()
    try:
        with _locked(folder, needed=False):
            yield folder
            sync_folder(folder)
            trash = parent / f".{out.name}{_REPLACED}{uuid.uuid4().hex[:8]}"
            if out.exists():
                out.rename(trash)
            try:
                folder.rename(out)
            except OSError:
                if trash.exists():
                    trash.rename(out)
                raise
            sync_folder(parent)
            shutil.rmtree(trash, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _clear_leftovers(out: Path) -> None:
    """Delete what a killed process left beside ``out``, or put the earlier data set back that it had moved aside.

    Whoever builds a folder holds a lock on it, which ends with the process. While one is at work nothing is touched.
    """
    parent = out.parent
    building = list(parent.glob(f".{glob.escape(out.name)}{_BUILDING}*"))
    replaced = list(parent.glob(f".{glob.escape(out.name)}{_REPLACED}*"))
    try:
        for folder in building:
            with _locked(folder, needed=True):
                shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # locked, or on a file system without locks
        return
    for folder in replaced:
        if out.exists():
            shutil.rmtree(folder, ignore_errors=True)
        else:
            folder.rename(out)


@contextmanager
def _locked(folder: Path, needed: bool) -> Iterator[None]:
    """Hold a lock on a folder. Raises OSError where it is ``needed`` and cannot be had."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if needed:
                raise
        yield
    finally:
        os.close(handle)
