"""Where the checkpoints of a run lie and what their meta.json says, for whoever reads no tensor of them."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infir2.checkpoint import manifest
from infir2.checkpoint.cause import reason
from infir2.data.tokenizer import has_tokenizer
from infir2.errors import CheckpointError

META = "meta.json"
TOKENIZER = "tokenizer"
"""Folder of a run, beside its checkpoints, with its tokenizer; in a converted one also with what is carried."""
STEP = re.compile(r"step-(\d{6,})")
"""Name of a checkpoint's folder."""


def step_folders(root: Path) -> list[tuple[int, Path]]:
    """The step folders in ``root``, newest first."""
    try:
        if not root.is_dir():
            return []
        found = [(match, path) for path in root.iterdir() if (match := STEP.fullmatch(path.name))]
        return sorted(((int(match[1]), path) for match, path in found if path.is_dir()), reverse=True)
    except OSError as error:
        raise CheckpointError(f"{root}: cannot be read: {reason(error)}") from error


def peek_meta(text: str | Path) -> dict[str, Any] | None:
    """``meta`` of the newest checkpoint that a user means (see ``find``), unverified; None where there is none.

    For what must be known before a model is built. What is loaded later is verified. ``tokenizer`` in it is what
    ``tokenizer_of`` finds. Raises CheckpointError where it cannot be read.
    """
    path = Path(text).expanduser()
    folders = [path, *(step for root in (path / "checkpoints", path) for _, step in step_folders(root))]
    for folder in folders:
        try:
            meta = json.loads((folder / META).read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            continue
        except OSError as error:
            raise manifest.unreadable(folder / META, error) from None
        if isinstance(meta, dict) and "architecture" in meta:  # else another program's file of this name
            tokenizer = tokenizer_of(folder, meta)
            return {**meta, "tokenizer": str(tokenizer) if tokenizer else None}
    return None


def tokenizer_of(checkpoint: Path, meta: Mapping[str, Any]) -> Path | None:
    """Folder of the tokenizer that the model in a checkpoint knows: the one in its run, else the one that meta names.

    In this order, because a run may be moved, and another one with another tokenizer may be made in its place.
    """
    beside = checkpoint.absolute().parent.parent / TOKENIZER
    recorded = Path(meta["tokenizer"]) if meta.get("tokenizer") else None
    return next((place for place in (beside, recorded) if place and has_tokenizer(place)), None)


def read_meta(path: Path) -> dict[str, Any]:
    """``meta`` of one checkpoint folder that has been verified. Raises CheckpointError where it is no JSON object."""
    try:
        meta = json.loads((path / META).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / META}: cannot be read as JSON: {error}") from None
    if not isinstance(meta, dict):
        raise CheckpointError(f"{path / META}: not a JSON object")
    return meta
