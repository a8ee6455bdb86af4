"""The errors that a user can cause. The command line prints them as one line, without a traceback."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import PurePath


class UserError(Exception):
    """A mistake the user can mend: what is wrong, where (file, key, line) and how to mend it.

    The command line prints ``infir2: error: <message>``, once for every line of the message (each tells one mistake),
    and exits with ``exit_code``.
    """

    exit_code = 2


class ConfigError(UserError):
    """A recipe or an override that cannot be used."""


class DataError(UserError):
    """Training data that is missing, broken or does not fit the recipe."""


class CheckpointError(UserError):
    """A checkpoint or model folder that is missing, damaged or does not fit the model."""


class TrainingStopped(UserError):
    """Training stopped itself, for a reason that is not a fault of the program."""

    exit_code = 3


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``" Did you mean 'lr'?"`` where a known word is close, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def how_to_fetch(folder: str) -> str:
    """What to do about a model folder that is not there: nothing is downloaded unasked."""
    path = PurePath(folder)
    repository = f"Qwen/{path.name}" if path.name.lower().startswith("qwen") else "OWNER/NAME"
    place = f"models/{path.name}" if folder == repository else folder
    return f"Nothing is downloaded by itself; from the Hub: hf download {repository} --local-dir {place}"


def some_of(names: Sequence[str], limit: int = 4) -> str:
    """The first names, and how many there are where that is not all."""
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
