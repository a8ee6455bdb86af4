"""Durable folders: a SHA-256 manifest over every file, fsync, atomic rename, deletion by way of a trash name.

A folder is written under a temporary name and renamed when all of it is on disk, so a folder with its final name is
complete; the manifest then shows whether it is still what was written. MANIFEST.json carries a digest of itself and is
accepted only in the exact bytes that ``encode`` produces, so that a flipped bit in it is found as well.
"""

import hashlib
import json
import os
import shutil
import stat
import uuid
from pathlib import Path
from typing import NamedTuple

from infir2.durable import sync_folder
from infir2.errors import CheckpointError

MANIFEST = "MANIFEST.json"
TEMPORARY, TRASH = ".tmp-", ".trash-"
_FORMAT = 1
_CHUNK = 4 << 20


class Entry(NamedTuple):
    """What the manifest says of one file."""

    size: int
    """Bytes."""
    sha256: str
    """Lower-case hexadecimal digest."""


class Unreadable(CheckpointError):
    """A file that the system does not give. That says nothing against its bits: it is no damage."""


def measure(path: Path, sync: bool = False) -> Entry:
    """Size and SHA-256 of a file (a link is refused); with ``sync`` the file is fsynced first."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with open(handle, "rb", buffering=0) as file:
        if sync:
            os.fsync(handle)
        digest, size = hashlib.sha256(), 0
        buffer = memoryview(bytearray(_CHUNK))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return Entry(size, digest.hexdigest())


def encode(entries: dict[str, Entry]) -> bytes:
    """The bytes of MANIFEST.json: canonical JSON that holds its own digest."""
    files = {name: entries[name]._asdict() for name in sorted(entries)}
    table = {"format": _FORMAT, "files": files}
    table["sha256"] = hashlib.sha256(_canonical(table)).hexdigest()
    return _canonical(table)


def read(folder: Path) -> dict[str, Entry]:
    """The entries of a folder's manifest. Raises CheckpointError, naming the manifest, for anything not as written, and
    Unreadable where it cannot be read."""
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing, so the checkpoint cannot be trusted") from None
    except OSError as error:
        raise unreadable(path, error) from None
    try:
        files = json.loads(data)["files"]
        entries = {str(name): Entry(int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path}: damaged (not a manifest)") from None
    if encode(entries) != data:
        raise CheckpointError(f"{path}: damaged (its own digest does not match)")
    for name in entries:
        if name in ("", ".", "..", MANIFEST) or "/" in name or "\\" in name or "\0" in name:
            raise CheckpointError(f"{path}: refused: {name!r} is not a plain file name")
    return entries


def unreadable(path: Path, error: OSError) -> Unreadable:
    """The words for a file of a checkpoint that cannot be read."""
    return Unreadable(
        f"{path}: cannot be read: {error.strerror}, which does not make it damaged; let it be read and run the same "
        f"command again, or move {path.parent.name} away to go on without it"
    )


def problem_with(folder: Path, name: str, entry: Entry) -> str | None:
    """What is wrong with one file of the manifest, in one line that names it; None when it is as it was written.

    Raises Unreadable where that cannot be said.
    """
    path = folder / name
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            return f"{path}: not a regular file"
        if found.st_size != entry.size:
            return f"{path}: {found.st_size} bytes, the manifest says {entry.size}"
        if measure(path).sha256 != entry.sha256:
            return f"{path}: damaged (SHA-256 differs from the manifest)"
    except FileNotFoundError:
        return f"{path}: missing"
    except OSError as error:
        raise unreadable(path, error) from None
    return None


def publish(temporary: Path, final: Path) -> None:
    """Rename a finished, fsynced folder to its final name and make the rename durable."""
    sync_folder(temporary)
    os.rename(temporary, final)
    sync_folder(final.parent)


def to_trash(folder: Path) -> Path:
    """Take a folder out of sight in one step, so that a kill while it is deleted leaves no half folder behind."""
    trash = folder.parent / f"{TRASH}{folder.name}-{uuid.uuid4().hex[:8]}"
    os.rename(folder, trash)
    return trash


def empty_trash(root: Path) -> None:
    """Delete the folders that ``to_trash`` put aside in ``root``."""
    _delete(root, (TRASH,))


def remove_leftovers(root: Path) -> None:
    """Delete what an interrupted save or deletion left in ``root``."""
    if root.is_dir():
        _delete(root, (TEMPORARY, TRASH))


def _delete(root: Path, prefixes: tuple[str, ...]) -> None:
    failures = []
    for path in list(root.iterdir()):
        if path.name.startswith(prefixes):
            try:
                # A checkpoint that somebody moved elsewhere and linked is theirs where it lies.
                path.unlink() if path.is_symlink() else shutil.rmtree(path)
            except OSError as error:
                failures.append(error)
    if failures:
        raise failures[0]


def _canonical(table: dict[str, object]) -> bytes:
    return json.dumps(table, sort_keys=True, indent=1).encode() + b"\n"
