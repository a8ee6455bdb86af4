"""Which weights the KL term refers to: those that the run started from, written down then and the same ever after.

A recipe may name a run folder, whose newest checkpoint is another one tomorrow. So RUN/reference.json holds the folder
that was read, and a checksum of the weights in it.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from infir2.durable import replace_file
from infir2.errors import CheckpointError, UserError

FILE = "reference.json"


@dataclass(frozen=True)
class Reference:
    """What a run's KL term refers to."""

    named: str
    """Key and value of the recipe that name it."""
    path: str | None
    """The model or checkpoint folder that was read; None for random weights."""
    checksum: str
    """Of its parameters (``weights_checksum`` without codes)."""


def read_reference(run: Path) -> Reference | None:
    """What the run has referred to so far; None where nothing was written down."""
    path = run / FILE
    try:
        table = json.loads(path.read_bytes())
        return Reference(str(table["named"]), None if table["path"] is None else str(table["path"]), table["checksum"])
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: damaged; put back a good copy") from None


def write_reference(run: Path, reference: Reference) -> None:
    path = run / FILE
    try:
        replace_file(path, json.dumps(asdict(reference), indent=1).encode() + b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
