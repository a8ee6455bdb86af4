"""The tokenised rows of a fine-tuning run: made once, kept in its folder, opened by every process."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from infir2.config import ChatDataSection, SftConfig
from infir2.data.chat import ChatTokenizer
from infir2.data.conversations import ConversationSource
from infir2.data.documents import RowLedger
from infir2.data.order import held_out_rows
from infir2.data.replaced_folder import built_beside
from infir2.data.sft import RowCounts, TokenRows, tokenize_rows
from infir2.durable import write_file
from infir2.errors import DataError
from infir2.launch.held_folder import writing
from infir2.launch.progress import share_bar
from infir2.parallel.ranks import Ranks

_ROWS_FORMAT = 1
PATIENCE = timedelta(days=1)
"""How long the other processes wait while the first one tokenises: millions of long rows take more than an hour."""


@dataclass(frozen=True)
class SftRows:
    """The tokenised rows of a recipe."""

    train: TokenRows
    validation: TokenRows
    counts: dict[str, RowCounts]
    """Source (train, validation) -> what became of its rows."""
    sha256: str
    """Of the train rows."""
    held_out_sha256: str

    def is_intact(self) -> bool:
        """Whether the rows are what they were when their hashes were taken; reads all of them."""
        return (self.train.sha256(), self.validation.sha256()) == (self.sha256, self.held_out_sha256)


def tokenize(config: SftConfig, chat: ChatTokenizer, show_progress: bool) -> SftRows:
    """Read, tokenise and mask the recipe's conversations."""
    data = config.data

    def read(name: str, key: str) -> Any:
        ledger = RowLedger(data.max_bad_rows, "data.max_bad_rows")
        with share_bar(f"tokenising {key}", show_progress) as progress:
            source = ConversationSource(name, key)
            return tokenize_rows(source, chat, data.max_length, data.too_long, ledger, progress)

    train, origins, counted = read(data.train, "data.train")
    counts = {"train": counted}
    if data.validation is not None:
        validation, _, counts["validation"] = read(data.validation, "data.validation")
    else:
        rows = np.unique(origins)
        chosen = rows[held_out_rows(len(rows), config.train.seed, data.validation_fraction)]
        held_out = np.isin(origins, chosen)
        validation = train.select(np.flatnonzero(held_out))
        if held_out.any():
            train = train.select(np.flatnonzero(~held_out))
    return SftRows(train, validation, counts, train.sha256(), validation.sha256())


def tokenize_once(
    config: SftConfig, chat: ChatTokenizer, check: Callable[[SftRows | None], None] = lambda rows: None
) -> SftRows:
    """``tokenize`` on rank 0, kept under run/rows for the other ranks and for a resume, and opened on all ranks.

    ``check`` raises where the run does not go on: asked without rows before any are tokenised, and with the new ones
    before they are put in the place of older ones.
    """
    folder = Path(config.run) / "rows"
    key = _rows_key(config.data, config.train.seed, chat)

    def make() -> None:
        kept = _open_rows(folder, key)
        if kept is None or not kept.is_intact():
            check(None)
            rows = tokenize(config, chat, show_progress=True)
            check(rows)
            _save_rows(rows, folder, key)

    ranks = Ranks(PATIENCE)
    ranks.lead(make)
    opened = ranks.each(lambda: _open_rows(folder, key) is not None)
    rows = _open_rows(folder, key)
    if rows is None or not all(opened):
        raise DataError(f"{folder}: was written by rank 0, but not every process can read it; the run must be shared")
    return rows


def _rows_key(data: ChatDataSection, seed: int, chat: ChatTokenizer) -> str:
    """Changes when anything changes that decides the tokenised rows."""
    names = [("data.train", data.train), *([("data.validation", data.validation)] if data.validation else [])]
    content = [_ROWS_FORMAT, chat.identity, data.max_length, data.too_long, data.max_bad_rows]
    content += [[name, ConversationSource(name, key).identity()] for key, name in names]
    content += [] if data.validation else [data.validation_fraction, seed]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _open_rows(folder: Path, key: str) -> SftRows | None:
    """The rows kept in a folder; None unless all are there, made from what ``key`` stands for."""
    try:
        record = json.loads((folder / "rows.json").read_bytes())
        if record["key"] != key:
            return None
        counts = {name: RowCounts(**values) for name, values in record["counts"].items()}
        opened = TokenRows.open(folder, "train"), TokenRows.open(folder, "validation")
        rows = SftRows(*opened, counts, record["sha256"], record["held_out_sha256"])
    except (OSError, EOFError, ValueError, KeyError, TypeError):  # EOFError: numpy's for an empty file
        return None
    return rows if rows.train.is_whole() and rows.validation.is_whole() else None


def _save_rows(rows: SftRows, folder: Path, key: str) -> None:
    """Put the rows into their place, whole, instead of older ones."""
    hashes = {"sha256": rows.sha256, "held_out_sha256": rows.held_out_sha256}
    record = {"key": key, **hashes, "counts": {name: asdict(c) for name, c in rows.counts.items()}}
    with writing(folder), built_beside(folder) as temporary:
        rows.train.save(temporary, "train")
        rows.validation.save(temporary, "validation")
        write_file(temporary / "rows.json", (json.dumps(record, indent=1) + "\n").encode())
