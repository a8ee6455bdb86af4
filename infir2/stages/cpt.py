"""Continual pre-training: `infir2 cpt RECIPE [--section.key value ...]`.

Run the same command again to resume. Under torchrun the same command shards the model over the processes:
torchrun --standalone --nproc-per-node 8 -m -- infir2 cpt RECIPE. Where one GPU has room for all of it,
--parallel.replicate 8 gives each the whole model, which is faster. --dry-run shows what would be run.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from infir2.config import CptConfig, load
from infir2.errors import ConfigError
from infir2.launch.recipe_arguments import add_recipe_arguments

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Sequence

    from infir2.data.loader import TokenLoader
    from infir2.data.source import Source
    from infir2.launch.dry_run import Workload
    from infir2.model.config import ModelConfig
    from infir2.parallel.runtime import World
    from infir2.types import Batch

ACCEPTS_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser, CptConfig, "cpt_tiny.toml")
    parser.add_argument("--profile", action="store_true", help="trace three steps into RUN/profile")


def run(args: argparse.Namespace) -> int:
    from infir2.launch.run_folder import exit_code
    from infir2.parallel.runtime import world

    profiled = ["--log.profile_steps", "3"] if args.profile else []
    config = load(CptConfig, args.recipe, [*profiled, *args.overrides])
    with world(config.parallel.replicate) as here:
        if args.dry_run:
            show_plan(config, here)
            return 0
        return exit_code(train_cpt(config, here), config, here)


def show_plan(config: CptConfig, world: "World") -> None:
    """Print what the recipe would do; nothing is written. Raises UserError with all that is missing for it."""
    from infir2.config import to_toml
    from infir2.data.source import open_source
    from infir2.launch.dry_run import describe_run
    from infir2.launch.missing import Missing, likely_architecture
    from infir2.launch.model import starting_meta

    missing, data = Missing(), config.data
    missing.attempt(starting_meta, config)
    opened = [missing.attempt(open_source, name, data.validation_fraction) for name in data.sources]
    sources, note = [source for source in opened if source is not None], ""
    whole = len(sources) == len(opened)
    # A preset's vocabulary is that of the data.
    known = whole or config.model.preset is None
    architecture = missing.attempt(_fitting, config, sources) if known else None
    if architecture is not None and whole:
        missing.attempt(open_loader, config, world, architecture)
        missing.attempt(choose_tokenizer, config, world)
    if architecture is None:
        architecture, note = likely_architecture(config)
    work = workload(config)
    text = missing.attempt(describe_run, config, architecture, world.size, work) if architecture else None
    if world.is_main:
        print("\n".join(filter(None, (text or to_toml(config), note))))
    missing.tell()


def workload(config: CptConfig) -> "Workload":
    """How much the recipe computes."""
    from infir2.launch.dry_run import Workload

    data, train = config.data, config.train
    return Workload(train.steps, train.steps * train.global_batch * data.seq_len, train.micro_batch * data.seq_len)


def architecture_of(config: CptConfig) -> "ModelConfig":
    """The recipe's model; checks that it can hold the recipe's sequences."""
    from infir2.data.source import open_source

    return _fitting(config, [open_source(name, config.data.validation_fraction) for name in config.data.sources])


def _fitting(config: CptConfig, sources: "Sequence[Source]") -> "ModelConfig":
    from infir2.launch.model import model_config

    needed = max((source.vocab_size or 0 for source in sources), default=0)
    if not needed and config.model.preset and not config.model.vocab_size:
        raise ConfigError(
            "model.vocab_size: required, because no source says how large its vocabulary is (a Megatron pair does not)"
        )
    architecture = model_config(config, needed)
    architecture.check_sequence_length(config.data.seq_len)
    return architecture


def open_loader(config: CptConfig, world: "World", architecture: "ModelConfig") -> "TokenLoader":
    """The recipe's data for this rank; checks that they fit the model and that the batch sizes divide."""
    from infir2.data.loader import TokenLoader

    return TokenLoader(
        config.data.sources,
        config.data.seq_len,
        config.train.seed,
        config.train.global_batch,
        config.train.micro_batch,
        world.rank,
        world.size,
        document_attention=config.data.document_attention,
        validation_fraction=config.data.validation_fraction,
        vocab_size=architecture.vocab_size,
    )


def train_cpt(config: CptConfig, world: "World") -> "signal.Signals | None":
    """Run or resume continual pre-training. Returns the signal that ended it early, if any."""
    import torch

    from infir2.launch.data_check import verify_shards
    from infir2.launch.run_folder import check_start, keep_tokenizer
    from infir2.launch.stage_data import StageData
    from infir2.launch.training import run_training
    from infir2.model.attention import causal_attention, document_attention
    from infir2.train.loop import Feed

    check_start(config, world)
    architecture = architecture_of(config)
    loader = open_loader(config, world, architecture)
    tokenizer = choose_tokenizer(config, world)
    dtype = getattr(torch, config.model.dtype)

    def attention_for(batch: "Batch") -> "Callable":
        return document_attention(batch, dtype) if config.data.document_attention else causal_attention

    data = StageData(
        loop=config.train,
        feed=lambda used: Feed(lambda first, last, _: loader.stream(first - 1, last, used), attention_for),
        held_out=lambda: loader.validation_batches(config.train.eval_sequences),
        fingerprint=loader.fingerprint(),
        check=lambda run: verify_shards(loader.shard_files(), run, world),
        write=lambda run: keep_tokenizer(tokenizer, run),
    )
    return run_training(config, world, data, architecture, Path(config.run) / "tokenizer" if tokenizer else None)


def choose_tokenizer(config: CptConfig, world: "World") -> Path | None:
    """Folder of the tokenizer that goes with the trained model: the start model's, else the first prepared source's.

    Raises DataError where a source's token ids mean something else to the model; tells what cannot be compared.
    """
    from infir2.data.tokenizer import has_tokenizer
    from infir2.launch.data_check import check_token_ids
    from infir2.launch.model import starting_meta, starting_tokenizer

    mine = starting_tokenizer(config)
    if config.model.preset is None or starting_meta(config) is not None:  # else random weights, which know no ids yet
        notes = check_token_ids(list(config.data.sources), mine)
        if notes and world.is_main:
            print("\n".join(notes))
    return mine or next(filter(has_tokenizer, (Path(name) / "tokenizer" for name in config.data.sources)), None)
