"""Files that are whole or not there: written under another name, fsynced, renamed, and the folder fsynced too.

Also the files that a user names to be written: what is wrong with one is told before the work, in one line. And which
files of a folder that comes from elsewhere are its own.
"""

import errno
import itertools
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infir2.errors import UserError


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of the block names ``path``: of a full disk the system does not say which file met it."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and fsync it; for a folder that is renamed as a whole when it is finished."""
    with naming(path), open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Write a file, or a new content for it, in one step: whoever opens it finds the old content or the new one.

    Raises OSError, with the old content still there and nothing beside it.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with naming(path):
            write_file(temporary, data)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def check_output(path: Path, option: str) -> None:
    """Raise UserError where the file that ``option`` names cannot be written; asked before the work that fills it."""
    try:
        if path.is_dir():
            raise UserError(f"{option} {path}: is a folder; name a file")
        if not path.parent.is_dir():
            raise UserError(f"{option} {path}: there is no folder {path.parent}; make it, or name another file")
        if not _written_in_place(path):
            tempfile.TemporaryFile(dir=path.parent).close()
        elif path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written: {error.strerror}; name another file") from None


def write_output(path: Path, text: str) -> None:
    """Write a file that a user asked for, as ``replace_file`` does. Raises UserError where that cannot be."""
    try:
        if _written_in_place(path):
            path.write_text(text, encoding="utf-8")
        else:
            replace_file(path, text.encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def _written_in_place(path: Path) -> bool:
    """A link, and what is no plain file, such as /dev/stdout, stays what it is."""
    return path.is_symlink() or (path.exists() and not path.is_file())


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


def stays_inside(path: Path, folder: Path) -> bool:
    """Whether a file in ``folder`` lies there, too: a link in a stranger's folder may lead to any file of this machine,
    which would then be read, or copied to where others see it."""
    home, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    if target.parent == home:
        return True
    # The Hugging Face cache keeps files in blobs/ and links to them from snapshots/REVISION/.
    return home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"
