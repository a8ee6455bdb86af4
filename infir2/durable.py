"""Files that are whole or not there: written under another name, fsynced, renamed, and the folder fsynced too."""

import itertools
import os
import uuid
from pathlib import Path


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and fsync it; for a folder that is renamed as a whole when it is finished."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Write a file, or a new content for it, in one step: whoever opens it finds the old content or the new one.

    Raises OSError, with the old content still there and nothing beside it.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        write_file(temporary, data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def unused_name(path: Path) -> Path:
    """``path`` with the first number before its ending that is not taken: config.toml -> config.1.toml."""
    names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
