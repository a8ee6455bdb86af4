"""A folder into which one process at a time writes: the lock on it, and the words for what cannot be written there."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infir2.errors import UserError


@contextmanager
def held(folder: Path, busy: str, other: str, lock: str = ".lock") -> Iterator[None]:
    """Hold a folder, making it if need be, so that no second process writes into it.

    ``busy`` says that another process holds it, ``other`` what to do instead. The lock is the operating system's: it
    ends with the process, however that ends; a file system without locks (Lustre may be one) is told and goes without.
    Raises UserError where the folder is held, is none or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, but a folder is needed; {other}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / lock, "a")  # noqa: SIM115 - held open for as long as the lock is wanted
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be written: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: {busy}; wait for it, stop it, or {other}") from None
        except OSError as error:
            print(f"note: {folder} cannot be locked ({error.strerror}): see to it that nothing else writes into it")
        yield


def wait_until_free(folder: Path, seconds: float, lock: str = ".lock") -> None:
    """Wait while another process holds the folder, but no longer than ``seconds``: who takes it then will say so."""
    if not (folder / lock).exists():
        return
    deadline, told = time.monotonic() + seconds, False
    with open(folder / lock, "a") as file:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if not told:
                    print(f"{folder}: another process, asked to stop, is still saving; waiting for it", flush=True)
                told = True
                time.sleep(0.2)
            except OSError:  # a file system without locks
                return


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raise UserError, naming the file, where something cannot be written into the folder."""
    try:
        yield
    except OSError as error:
        reason = f"{error.filename or folder}: cannot be written: {error.strerror or error}"
        raise UserError(f"{reason}; make room or mend it, and run the same command again") from None
