"""Before training: are the token shards what `infir2 prepare` wrote, are their ids the model tokenizer's, and are rows
that are held out not trained on?"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from infir2.config import ChatDataSection, RlDataSection
from infir2.data.conversations import shared_rows
from infir2.data.dataset import ShardFile
from infir2.data.tokenizer import clash, has_tokenizer
from infir2.durable import replace_file
from infir2.errors import DataError, some_of
from infir2.launch.held_folder import writing
from infir2.launch.progress import by_pieces, bytes_bar

if TYPE_CHECKING:
    from infir2.parallel.runtime import World

ANNOUNCED = 2_000_000_000
"""Bytes whose reading is told beforehand, for logs, where no progress bar is drawn."""
VERDICTS = "verified_data.json"
"""In the run folder: .bin files whose hash was right, with the size and time that they had then."""


def verify_shards(files: Sequence[ShardFile], run: Path, world: "World") -> None:
    """Compare the SHA-256 of every shard with its record; the processes share the files.

    An index is small and always read. A .bin is read once a run, and again when its size, its time of change or its
    record differs. Collective. Raises DataError, naming the file, on every process where one is damaged.
    """
    from infir2.parallel.ranks import Ranks

    ranks = Ranks()
    known = ranks.lead(lambda: _read_verdicts(run / VERDICTS))
    unread = ranks.lead(lambda: [f for f in files if f.path.suffix != ".bin" or known.get(str(f.path)) != _facts(f)])
    total = sum(file.size for file in unread)
    if world.is_main and total > ANNOUNCED:
        print(f"comparing {total / 1e9:.1f} GB of token shards with their hashes, once a run")
    parts = ranks.each(lambda: _verify(ranks.share(unread), quiet=not world.is_main))
    found = {name: facts for part in parts for name, facts in part.items()}
    if found.items() - known.items():
        ranks.lead(lambda: _write_verdicts(run, known | found))


def check_token_ids(sources: Sequence[str], model: Path | None) -> list[str]:
    """Compare the tokenizer of every source with ``model``'s (folder; None = not known).

    Returns a line for everything that could not be compared. Raises DataError where an id means something else.
    """
    notes = []
    if model is None:
        notes.append("the model brings no tokenizer")
    for source in sources:
        folder = Path(source) / "tokenizer"
        if not has_tokenizer(folder):
            notes.append(f"{source} does not say which tokenizer made it")
        elif model is not None and (found := clash(folder, model)):
            other = "does not exist" if found.right is None else f"is {found.right}"
            raise DataError(
                f"data.sources: {source}: its token ids are not the model's: token {found.token!r} is {found.left} in "
                f"{folder} and {other} in {model}. Prepare it with --tokenizer {model}"
            )
    return [f"note: {note}: nobody can check that the token ids of the data are those of the model" for note in notes]


def check_same_ids(model: Path, chosen: Path) -> None:
    """Raises DataError where a token of the model's tokenizer has another id, or none, in the one that was chosen."""
    if found := clash(model, chosen):
        other = "does not exist" if found.right is None else f"is {found.right}"
        raise DataError(
            f"{chosen}: not a tokenizer for this model: token {found.token!r} is {found.left} in {model}, which the "
            f"model was trained with, and {other} in {chosen}. Leave data.tokenizer out, name one that adds to it, "
            f"or, where the token was renamed on purpose, copy the new tokenizer over the one in {model}"
        )


def check_held_out(data: ChatDataSection | RlDataSection) -> list[str]:
    """A line where data.validation reads what is trained on. Token shards have splits of their own that are apart."""
    if data.validation is None or not (shared := shared_rows(data.validation, data.train)):
        return []
    return [
        f"note: data.validation and data.train both read {some_of(shared, 1)}: held-out results are then those of rows "
        "that are trained on"
    ]


def _verify(files: Sequence[ShardFile], quiet: bool) -> dict[str, str]:
    # Before the hashes: what changes while it is read is read again next time.
    facts = {str(file.path): _facts(file) for file in files if file.path.suffix == ".bin"}
    with bytes_bar(Console(quiet=quiet), "verifying data") as report:
        advance = by_pieces(report, sum(file.size for file in files))
        for file in files:
            file.check_hash(advance)
    return facts


def _facts(file: ShardFile) -> str:
    """What must be as it was for a verdict to hold: size, time of change and hash."""
    facts = file.path.stat()
    return f"{facts.st_size} {facts.st_mtime_ns} {file.sha256}"


def _write_verdicts(run: Path, verdicts: dict[str, str]) -> None:
    with writing(run):
        replace_file(run / VERDICTS, json.dumps(verdicts, indent=1).encode())


def _read_verdicts(path: Path) -> dict[str, str]:
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
