"""Supervised fine-tuning on conversations: `infir2 sft RECIPE [--section.key value ...]`.

Run the same command again to resume; torchrun works as for `infir2 cpt`. Stage 2 names stage 1's run under
init.checkpoint. --dry-run reads and tokenises the data and shows what would be run.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infir2.config import SftConfig, check_ramps, load
from infir2.errors import ConfigError, DataError
from infir2.launch.recipe_arguments import add_recipe_arguments

if TYPE_CHECKING:
    import signal

    from infir2.data.chat import ChatTokenizer
    from infir2.data.sft import SftLoader
    from infir2.launch.sft_rows import SftRows
    from infir2.launch.stage_data import StageData
    from infir2.parallel.runtime import World

ACCEPTS_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser, SftConfig, "sft_tiny_stage1.toml")


def run(args: argparse.Namespace) -> int:
    from infir2.launch.run_folder import exit_code
    from infir2.parallel.runtime import world

    config = load(SftConfig, args.recipe, args.overrides)
    with world(config.parallel.replicate) as here:
        if args.dry_run:
            if here.is_main:
                show_plan(config, here)
            return 0
        return exit_code(train_sft(config, here), config, here)


def show_plan(config: SftConfig, world: "World") -> None:
    """Print what the recipe would do; nothing is written. Raises UserError with all that is missing for it."""
    from infir2.config import to_toml
    from infir2.launch.chat_model import open_model
    from infir2.launch.dry_run import Workload, describe_run
    from infir2.launch.missing import Missing, likely_architecture
    from infir2.launch.sft_rows import tokenize

    missing, lines = Missing(), []
    has_rows, opened = missing.has_rows(config.data), missing.attempt(open_model, config)
    work = Workload(0, 0, config.data.max_tokens_per_gpu)
    if opened is not None and has_rows:
        data = missing.attempt(tokenize, config, opened[0], world.is_main)
        if data is not None and (loader := missing.attempt(open_loader, config, data, world)) is not None:
            tokens = config.train.epochs * int((data.train.lengths - 1).sum())
            work = Workload(loader.steps, tokens, config.data.max_tokens_per_gpu)
            lines = _data_lines(config, data, loader)
    architecture, note = (opened[2], "") if opened is not None else likely_architecture(config)
    text = missing.attempt(describe_run, config, architecture, world.size, work) if architecture else None
    print("\n".join(filter(None, (text or to_toml(config), note, *lines))))
    missing.tell()


def train_sft(config: SftConfig, world: "World") -> "signal.Signals | None":
    """Run or resume supervised fine-tuning. Returns the signal that ended it early, if any."""
    from infir2.launch.chat_model import open_model
    from infir2.launch.restore import check_newest
    from infir2.launch.run_folder import check_start, locked
    from infir2.launch.sft_rows import tokenize_once
    from infir2.launch.training import run_training

    check_start(config, world)
    chat, tokenizer, architecture = open_model(config)
    run = Path(config.run)

    def stage_data(rows: "SftRows", loader: "SftLoader") -> "StageData":
        return _stage_data(config, rows, loader, chat, tokenizer)

    def check(rows: "SftRows | None") -> None:
        if rows is None:
            check_newest(config, architecture)
        else:
            check_newest(config, architecture, lambda: stage_data(rows, open_loader(config, rows, world)))

    with locked(run, world) if run.exists() else nullcontext():  # a run that is going on keeps its rows
        rows = tokenize_once(config, chat, check)
    loader = open_loader(config, rows, world)
    if world.is_main:
        print("\n".join(_data_lines(config, rows, loader)))
    data = stage_data(rows, loader)
    return run_training(config, world, data, architecture, run / "tokenizer")


def _stage_data(
    config: SftConfig, rows: "SftRows", loader: "SftLoader", chat: "ChatTokenizer", tokenizer: Path
) -> "StageData":
    import torch

    from infir2.launch.run_folder import keep_tokenizer
    from infir2.launch.stage_data import StageData
    from infir2.model.attention import document_attention
    from infir2.train.loop import Feed

    dtype = getattr(torch, config.model.dtype)
    feed = Feed(
        batches=lambda first, last, _: loader.stream(first, last),
        attention_for=lambda batch: document_attention(batch, dtype),
        step_values=lambda step, _: loader.values(step),
    )
    return StageData(
        loop=config.train.with_steps(loader.steps),
        feed=lambda used: feed,
        held_out=lambda: loader.held_out(rows.validation, config.train.eval_sequences),
        fingerprint=loader.fingerprint(rows.sha256),
        order_keys="rows, tokenizer, chat template, max_length, held-out rows or seed",
        continues=False,
        summary=_data_event(rows, loader),
        write=lambda run: keep_tokenizer(tokenizer, run, chat.template),
    )


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


def _data_lines(config: SftConfig, data: "SftRows", loader: "SftLoader") -> list[str]:
    """What the data hold, for people."""
    from infir2.launch.data_check import check_held_out

    lines = [f"{name}: {counts.summary()}" for name, counts in data.counts.items()]
    return [
        *lines,
        f"{len(data.train):,} samples to train on, {len(data.validation):,} held out; {loader.steps:,} steps, "
        f"{loader.steps_per_epoch:,} an epoch; packing efficiency {loader.efficiency():.2%}",
        *check_held_out(config.data),
    ]


def _data_event(data: "SftRows", loader: "SftLoader") -> dict[str, Any]:
    counts = data.counts["train"]
    return {
        **{name: getattr(counts, name) for name in ("rows", "samples", "dropped", "truncated", "tokens")},
        "trained_tokens": counts.trained_tokens,
        "bad_rows": sum(counts.bad.values()),
        "held_out": len(data.validation),
        "steps_per_epoch": loader.steps_per_epoch,
        "packing_efficiency": round(loader.efficiency(), 5),
    }
