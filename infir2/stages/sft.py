"""Supervised fine-tuning on conversations: `infir2 sft RECIPE [--section.key value ...]`.

Run the same command again to resume; torchrun works as for `infir2 cpt`. Stage 2 names stage 1's run under
init.checkpoint. --dry-run reads and tokenises the data and shows what would be run.
"""

import argparse
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infir2.config import ChatDataSection, RlConfig, SftConfig, check_ramps, describe, load
from infir2.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    import signal

    from infir2.data.chat import ChatTokenizer
    from infir2.data.sft import RowCounts, SftLoader, TokenRows
    from infir2.model.config import ModelConfig
    from infir2.parallel.runtime import World

ACCEPTS_OVERRIDES = True
_ROWS_FORMAT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="TOML file, such as recipes/sft_tiny_stage1.toml")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe, parameters and memory; stop")
    parser.epilog = "recipe keys (override with --section.key value):\n" + "\n".join(
        f"  --{key}  [{default}]\n      {text}" for key, default, text in describe(SftConfig)
    )


def run(args: argparse.Namespace) -> int:
    from infir2.parallel.runtime import world
    from infir2.stages.run_folder import exit_code

    config = load(SftConfig, args.recipe, args.overrides)
    with world(config.parallel.replicate) as here:
        if args.dry_run:
            if here.is_main:
                print(plan(config, here))
            return 0
        return exit_code(train_sft(config, here), config, here)


def plan(config: SftConfig, world: "World") -> str:
    """What the recipe would do, for people; nothing is written."""
    from infir2.stages.dry_run import Workload, describe_run

    chat, _, architecture = open_model(config)
    data = tokenize(config, chat, show_progress=world.is_main)
    loader = open_loader(config, data, world)
    tokens = config.train.epochs * int((data.train.lengths - 1).sum())
    work = Workload(loader.steps, tokens, config.data.max_tokens_per_gpu)
    return "\n".join([describe_run(config, architecture, world.size, work), *_data_lines(data, loader)])


def train_sft(config: SftConfig, world: "World") -> "signal.Signals | None":
    """Run or resume supervised fine-tuning. Returns the signal that ended it early, if any."""
    import torch

    from infir2.model.attention import document_attention
    from infir2.stages.training import StageData, run_training

    chat, tokenizer, architecture = open_model(config)
    rows = tokenize_once(config, chat, world)
    loader = open_loader(config, rows, world)
    if world.is_main:
        print("\n".join(_data_lines(rows, loader)))
    dtype = getattr(torch, config.model.dtype)
    data = StageData(
        loop=config.train.with_steps(loader.steps),
        batches=lambda first, last, offset, _: loader.stream(first, last),
        held_out=lambda: loader.held_out(rows.validation, config.train.eval_sequences),
        attention_for=lambda batch: document_attention(batch, dtype),
        fingerprint=loader.fingerprint(rows.sha256),
        order_keys="rows, tokenizer, chat template, max_length, held-out rows or seed",
        continues=False,
        step_values=lambda step, _: loader.values(step),
        summary=_data_event(rows, loader),
        write=lambda run: keep_tokenizer(tokenizer, chat.template, run / "tokenizer"),
    )
    return run_training(config, world, data, architecture, Path(config.run) / "tokenizer")


def open_model(config: SftConfig | RlConfig) -> "tuple[ChatTokenizer, Path, ModelConfig]":
    """The recipe's chat tokenizer, its folder, and the architecture; checks that they fit each other."""
    from infir2.data.chat import ChatTokenizer, choose_template
    from infir2.data.tokenizer import load_tokenizer, vocabulary_size
    from infir2.stages.data_check import check_same_ids
    from infir2.stages.training import model_config, starting_tokenizer

    folder = _tokenizer_folder(config)
    if (known := starting_tokenizer(config)) is not None:
        check_same_ids(known, folder)
    tokenizer = load_tokenizer(folder)
    size = vocabulary_size(tokenizer)
    architecture = model_config(config, size)
    architecture.check_sequence_length(*config.longest)
    if size > architecture.vocab_size:
        raise DataError(f"{folder}: the tokenizer has {size} tokens, but the model has {architecture.vocab_size}")
    return ChatTokenizer(tokenizer, choose_template(tokenizer, config.data.chat_template)), folder, architecture


def open_loader(config: SftConfig, data: "SftRows", world: "World") -> "SftLoader":
    """The order and packing of the recipe's rows for this rank; checks that the schedule fits the steps."""
    from infir2.data.sft import SftLoader
    from infir2.train.graphs import can_record

    train, tokens = config.train, config.data.max_tokens_per_gpu
    if not len(data.train):
        raise DataError(f"data.train: no row is left to train on: {data.counts['train'].summary()}")
    whole = train.cuda_graphs and can_record(world)
    loader = SftLoader(data.train, train.seed, train.global_batch, train.epochs, tokens, world.rank, world.size, whole)
    try:
        check_ramps(config.optim, loader.steps)
    except ValueError as error:
        raise ConfigError(f"{error}, which follow from the rows, train.epochs and train.global_batch") from None
    if train.eval_every and not len(data.validation):
        raise ConfigError(
            "train.eval_every: no row is held out; give data.validation or data.validation_fraction, or set it to 0"
        )
    return loader


@dataclass(frozen=True)
class SftRows:
    """The tokenised rows of a recipe."""

    train: "TokenRows"
    validation: "TokenRows"
    counts: "dict[str, RowCounts]"
    """Source (train, validation) -> what became of its rows."""
    sha256: str
    """Of the train rows."""


def tokenize(config: SftConfig, chat: "ChatTokenizer", show_progress: bool) -> SftRows:
    """Read, tokenise and mask the recipe's conversations."""
    import numpy as np

    from infir2.data.conversations import ConversationSource
    from infir2.data.documents import RowLedger
    from infir2.data.order import held_out_rows
    from infir2.data.sft import tokenize_rows

    data = config.data

    def read(name: str, key: str) -> Any:
        ledger = RowLedger(data.max_bad_rows, "data.max_bad_rows")
        with progress_bar(f"tokenising {key}", show_progress) as progress:
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
    return SftRows(train, validation, counts, train.sha256())


def tokenize_once(config: SftConfig, chat: "ChatTokenizer", world: "World") -> SftRows:
    """``tokenize`` on rank 0, kept under run/rows for the other ranks and for a resume, and opened on all ranks."""
    from infir2.checkpoint.ranks import Ranks

    folder = Path(config.run) / "rows"
    key = _rows_key(config.data, config.train.seed, chat)

    def make() -> None:
        if _open_rows(folder, key) is None:
            _save_rows(tokenize(config, chat, show_progress=True), folder, key)

    ranks = Ranks()
    ranks.lead(make)
    opened = ranks.each(lambda: _open_rows(folder, key) is not None)
    rows = _open_rows(folder, key)
    if rows is None or not all(opened):
        raise DataError(f"{folder}: was written by rank 0, but not every process can read it; the run must be shared")
    return rows


def _rows_key(data: ChatDataSection, seed: int, chat: "ChatTokenizer") -> str:
    """Changes when anything changes that decides the tokenised rows."""
    from infir2.data.conversations import ConversationSource

    names = [("data.train", data.train), *([("data.validation", data.validation)] if data.validation else [])]
    content = [_ROWS_FORMAT, chat.identity, data.max_length, data.too_long, data.max_bad_rows]
    content += [[name, ConversationSource(name, key).identity()] for key, name in names]
    content += [] if data.validation else [data.validation_fraction, seed]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _open_rows(folder: Path, key: str) -> SftRows | None:
    """The rows kept in a folder; None unless they are whole and made from what ``key`` stands for."""
    from infir2.data.sft import RowCounts, TokenRows

    try:
        record = json.loads((folder / "rows.json").read_bytes())
        if record["key"] != key:
            return None
        counts = {name: RowCounts(**values) for name, values in record["counts"].items()}
        rows = SftRows(TokenRows.open(folder, "train"), TokenRows.open(folder, "validation"), counts, record["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return rows if rows.train.is_whole() and rows.validation.is_whole() else None


def _save_rows(rows: SftRows, folder: Path, key: str) -> None:
    """Write the rows beside their place and rename them into it, replacing older ones."""
    temporary = folder.with_name(f".rows-{uuid.uuid4().hex[:8]}")
    record = {"key": key, "sha256": rows.sha256, "counts": {name: asdict(c) for name, c in rows.counts.items()}}
    try:
        temporary.mkdir(parents=True)
        rows.train.save(temporary, "train")
        rows.validation.save(temporary, "validation")
        (temporary / "rows.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except OSError as error:
        raise DataError(f"{error.filename or folder}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tokenizer_folder(config: SftConfig | RlConfig) -> Path:
    """The recipe's tokenizer: the one it names, else that of the model that training starts from."""
    from infir2.stages.training import starting_meta

    if config.data.tokenizer is not None:
        return Path(config.data.tokenizer)
    if config.init.checkpoint is not None:
        meta = starting_meta(config)
        if meta is None:
            raise CheckpointError(f"{config.init.checkpoint}: no checkpoint to start from")
        if meta.get("tokenizer") and Path(meta["tokenizer"]).exists():
            return Path(meta["tokenizer"])
    if config.model.path is not None:
        return Path(config.model.path)
    raise ConfigError("data.tokenizer: required, because the model that training starts from does not bring one")


def keep_tokenizer(source: Path, template: str, folder: Path) -> None:
    """The tokenizer and the chat template that the model is trained with, in the run folder."""
    from infir2.data.tokenizer import copy_tokenizer

    if source.resolve() != folder.resolve():
        copy_tokenizer(source, folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _data_lines(data: SftRows, loader: "SftLoader") -> list[str]:
    """What the data hold, for people."""
    lines = [f"{name}: {counts.summary()}" for name, counts in data.counts.items()]
    return [
        *lines,
        f"{len(data.train):,} samples to train on, {len(data.validation):,} held out; {loader.steps:,} steps, "
        f"{loader.steps_per_epoch:,} an epoch; packing efficiency {loader.efficiency():.2%}",
    ]


def _data_event(data: SftRows, loader: "SftLoader") -> dict[str, Any]:
    counts = data.counts["train"]
    return {
        **{name: getattr(counts, name) for name in ("rows", "samples", "dropped", "truncated", "tokens")},
        "trained_tokens": counts.trained_tokens,
        "bad_rows": sum(counts.bad.values()),
        "held_out": len(data.validation),
        "steps_per_epoch": loader.steps_per_epoch,
        "packing_efficiency": round(loader.efficiency(), 5),
    }


@contextmanager
def progress_bar(what: str, show: bool) -> Iterator[Callable[[float], object]]:
    """A bar on the terminal that is told the share that is done."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (show and console.is_terminal)) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda share: bar.update(task, completed=share)
