"""Continual pre-training: `infir2 cpt RECIPE [--section.key value ...]`.

Run the same command again to resume. Under torchrun the same command shards the model over the processes:
torchrun --standalone --nproc-per-node 8 -m infir2 cpt RECIPE. --dry-run shows what would be run.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from infir2.config import CptConfig, describe, load
from infir2.errors import ConfigError

if TYPE_CHECKING:
    from infir2.data.loader import TokenLoader
    from infir2.model.config import ModelConfig
    from infir2.parallel.runtime import World
    from infir2.stages.dry_run import Workload

ACCEPTS_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="TOML file, such as recipes/cpt_tiny.toml")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe, parameters and memory; stop")
    parser.epilog = "recipe keys (override with --section.key value):\n" + "\n".join(
        f"  --{key}  [{default}]\n      {text}" for key, default, text in describe(CptConfig)
    )


def run(args: argparse.Namespace) -> int:
    from infir2.parallel.runtime import world
    from infir2.stages.dry_run import describe_run

    config = load(CptConfig, args.recipe, args.overrides)
    with world(config.parallel.replicate) as here:
        if args.dry_run:
            architecture = architecture_of(config)
            open_loader(config, here, architecture)
            if here.is_main:
                print(describe_run(config, architecture, here.size, workload(config)))
            return 0
        finished = train_cpt(config, here)
    if not finished:
        if here.is_main:
            print(f"stopped on request; run the same command to resume {config.run}")
        return 143
    return 0


def workload(config: CptConfig) -> "Workload":
    """How much the recipe computes."""
    from infir2.stages.dry_run import Workload

    data, train = config.data, config.train
    return Workload(train.steps, train.steps * train.global_batch * data.seq_len, train.micro_batch * data.seq_len)


def architecture_of(config: CptConfig) -> "ModelConfig":
    """The recipe's model; checks that it can hold the recipe's sequences."""
    from infir2.data.source import open_source
    from infir2.stages.training import model_config

    sources = [open_source(name, config.data.validation_fraction) for name in config.data.sources]
    needed = max(source.vocab_size or 0 for source in sources)
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


def train_cpt(config: CptConfig, world: "World") -> bool:
    """Run or resume continual pre-training. Returns False where a signal ended it early."""
    import torch

    from infir2.model.attention import causal_attention, document_attention
    from infir2.stages.training import StageData, run_training

    architecture = architecture_of(config)
    loader = open_loader(config, world, architecture)
    dtype = getattr(torch, config.model.dtype)
    data = StageData(
        loop=config.train,
        batches=lambda first, last, offset: loader.stream(first - 1, last, offset),
        held_out=lambda: loader.validation_batches(config.train.eval_sequences),
        attention_for=(lambda batch: document_attention(batch, dtype))
        if config.data.document_attention
        else (lambda batch: causal_attention),
        fingerprint=loader.fingerprint(),
        sequence_length=config.data.seq_len,
    )
    return run_training(config, world, data, architecture, _tokenizer_folder(config))


def _tokenizer_folder(config: CptConfig) -> Path | None:
    """The tokenizer that goes with the trained model: the start model's, else the first prepared source's."""
    if config.model.path is not None:
        return Path(config.model.path)
    folders = [Path(name) / "tokenizer" for name in config.data.sources]
    return next((folder for folder in folders if folder.is_dir()), None)
