"""Data sets by name, by the package `datasets`: from its cache or the Hugging Face Hub. The only thing of a recipe that
is ever downloaded, so a name that may be a mistyped path is none."""

import difflib
import os
import re
import socket
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from infir2.errors import DataError

_NAME = re.compile(r"(?P<name>(?P<owner>[\w.-]+)/[\w.-]+)(:(?P<split>[\w.\[\]%:+-]+))?")
_FILES = (".jsonl", ".parquet", ".json", ".gz", ".zst")
_PATIENCE = 5.0
"""Seconds to wait for the Hub's first answer."""
_announced: set[str] = set()


def load_named(name: str, key: str) -> Any:
    """The data set ``owner/name`` or ``owner/name:split`` that ``key`` of a recipe names.

    Raises DataError where there is none, at once where the name looks like a path: another number of slashes, the
    ending of a file, or a first part that is a folder here.
    """
    match = _NAME.fullmatch(name)
    if match is None or name.startswith(".") or name.endswith(_FILES) or Path(match["owner"]).is_dir():
        raise DataError(f"{key}: {name}: no such file or folder{_near(Path(name))}")
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{key}: {name}: no such file or folder; to load a data set of that name: pip install 'infir2[datasets]'"
        ) from None
    _announce(f"{key}: {name}: no file or folder here; loading the data set of that name from the Hub or its cache")
    with _offline_without_network() as offline:
        try:
            return datasets.load_dataset(match["name"], split=match["split"] or "train")
        except Exception as error:  # the package and the network below it raise many kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            reason = "the Hub cannot be reached, and it is not in the cache" if offline else reason
            raise DataError(
                f"{key}: {name}: there is no such file or folder, and it cannot be loaded as a data set ({reason}). "
                "Without a network, name a local file"
            ) from None


def same_named(one: str, other: str) -> bool:
    """Whether two names mean rows of one data set of which some are surely the same: two slices of it may not be."""
    splits = []
    for name in (one, other):
        place, _, split = name.partition(":")
        splits.append((place, *(split or "train").partition("[")))
    (place, split, _, slice), (other_place, other_split, _, other_slice) = splits
    return (place, split) == (other_place, other_split) and (slice == other_slice or not (slice and other_slice))


def _near(path: Path) -> str:
    """A similar name in the folder where the path would lie."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, 1, cutoff=0.75)
    where = f" in {path.parent}" if path.parent != Path() else ""
    return f"{where}. Did you mean {close[0]!r}?" if close else ""


def _announce(line: str) -> None:
    """Once, by the first process: sources are opened more than once."""
    if line not in _announced and os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
    _announced.add(line)


@contextmanager
def _offline_without_network() -> Iterator[bool]:
    """Ask the Hub's machine once. Where it does not answer, the libraries are told so: they would try each of their
    files six times, for half a minute."""
    import datasets
    from huggingface_hub import constants

    flags: list[Any] = [constants, datasets.config]
    before = [flag.HF_HUB_OFFLINE for flag in flags]
    offline = any(before) or not _answers(constants.ENDPOINT)
    try:
        for flag in flags:
            flag.HF_HUB_OFFLINE = offline
        yield offline
    finally:
        for flag, value in zip(flags, before):
            flag.HF_HUB_OFFLINE = value


def _answers(url: str) -> bool:
    if urllib.request.getproxies():
        return True  # then this machine may well reach nothing by itself
    place = urlsplit(url)
    try:
        port = place.port or (80 if place.scheme == "http" else 443)
        socket.create_connection((place.hostname or "", port), timeout=_PATIENCE).close()
    except (OSError, ValueError):
        return False
    return True
