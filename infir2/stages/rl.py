"""Reinforcement learning on prompts with checkable answers: `infir2 rl RECIPE [--section.key value ...]`.

GRPO with DAPO's refinements: groups of samples from the embedded engine, which shares the trainer's weights; rewards;
one or more optimiser steps; again. Under torchrun every process holds the whole model, samples its share of the prompts
and learns from its share of the samples. Run the same command again to resume. Stage 1 names a fine-tuning run under
init.checkpoint, stage 2 names stage 1's. --dry-run reads the prompts and shows what would be run.
"""

import argparse
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infir2.config import RewardSection, RlConfig, load
from infir2.errors import ConfigError
from infir2.launch.recipe_arguments import add_recipe_arguments

if TYPE_CHECKING:
    import signal

    from infir2.data.chat import ChatTokenizer
    from infir2.data.prompts import PromptSet
    from infir2.model.config import ModelConfig
    from infir2.parallel.runtime import World
    from infir2.reward.score import Scorer

ACCEPTS_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser, RlConfig, "rl_tiny_stage1.toml")


def run(args: argparse.Namespace) -> int:
    from infir2.launch.run_folder import exit_code
    from infir2.parallel.runtime import world

    config = load(RlConfig, args.recipe, args.overrides)
    with world(None) as here:
        if config.parallel.replicate not in (1, here.size):
            raise ConfigError(
                f"parallel.replicate ({config.parallel.replicate}): infir2 rl holds the whole model in each of its "
                f"{here.size} process(es); leave it out"
            )
        if args.dry_run:
            show_plan(config, here)
            return 0
        return exit_code(train_rl(config, here), config, here)


def show_plan(config: RlConfig, world: "World") -> None:
    """Print what the recipe would do; nothing is written. Raises UserError with all that is missing for it."""
    from infir2.config import to_toml
    from infir2.launch.dry_run import Workload, describe_run
    from infir2.launch.missing import Missing, likely_architecture

    missing, lines = Missing(), []
    has_rows, opened = missing.has_rows(config.data), missing.attempt(open_policy, config)
    if opened is not None and has_rows:
        data = missing.attempt(_checked_data, config, opened[0], world)
        lines = _data_lines(config, data) if data is not None else []
    architecture, note = (opened[2], "") if opened is not None else likely_architecture(config)
    train, (longest, _) = config.train, config.longest
    tokens = train.steps * train.global_batch * longest
    work = Workload(train.steps, tokens, config.data.max_tokens_per_gpu, at_most=True)
    text = missing.attempt(describe_run, config, architecture, world.size, work) if architecture else None
    cache = _cache_line(config, architecture) if architecture else ""
    if world.is_main:
        print("\n".join(filter(None, (text or to_toml(config), cache, note, *lines))))
    missing.tell()


def _checked_data(config: RlConfig, chat: "ChatTokenizer", world: "World") -> "list[PromptSet]":
    """``read_data`` with a scorer for as long as that takes."""
    with closing(make_scorer(config.reward)) as scorer:
        return read_data(config, chat, scorer, show_progress=world.is_main)


def _cache_line(config: RlConfig, architecture: "ModelConfig") -> str:
    """The memory of the engine's cache."""
    import torch

    from infir2.launch.dry_run import GIB
    from infir2.rollout.cache_size import bytes_per_token, stored_dtype

    rollout = config.rollout
    shape = (architecture.num_hidden_layers, architecture.num_key_value_heads, architecture.head_dim)
    token = bytes_per_token(*shape, stored_dtype(rollout.cache_dtype, getattr(torch, config.model.dtype)))
    return (
        f"while it samples, the engine's cache of {rollout.cache_tokens:,} tokens: "
        f"{rollout.cache_tokens * token / GIB:.2f} GiB"
    )


def train_rl(config: RlConfig, world: "World") -> "signal.Signals | None":
    """Run or resume reinforcement learning. Returns the signal that ended it early, if any."""
    from infir2.launch.rl_stage import RlStage
    from infir2.launch.run_folder import check_start
    from infir2.launch.training import run_training

    check_start(config, world)
    chat, tokenizer, architecture = open_policy(config)
    with closing(make_scorer(config.reward)) as scorer:
        data = read_data(config, chat, scorer, show_progress=world.is_main)
        if world.is_main:
            print("\n".join(_data_lines(config, data)))
        stage = RlStage(config, architecture, chat, tokenizer, data, scorer, world).stage_data()
        return run_training(config, world, stage, architecture, Path(config.run) / "tokenizer")


def open_policy(config: RlConfig) -> "tuple[ChatTokenizer, Path, ModelConfig]":
    """The recipe's chat tokenizer, its folder, and the architecture; checks that they fit each other and any sample."""
    from infir2.launch.chat_model import open_model

    chat, tokenizer, architecture = open_model(config)
    architecture.check_sequence_length(*config.longest_sample)
    return chat, tokenizer, architecture


def read_data(config: RlConfig, chat: "ChatTokenizer", scorer: "Scorer", show_progress: bool) -> "list[PromptSet]":
    """The prompts to train on, enough for a rollout, and, where the recipe names them, the held-out ones."""
    from infir2.data.conversations import RowSource
    from infir2.data.documents import RowLedger
    from infir2.data.prompts import PromptOrder, prompt_row, read_prompts
    from infir2.launch.progress import share_bar

    data = config.data
    names = {"data.train": data.train} | ({"data.validation": data.validation} if data.validation else {})
    found = []
    for key, name in names.items():
        ledger = RowLedger(data.max_bad_rows, "data.max_bad_rows")
        with share_bar(f"reading {key}", show_progress) as progress:
            source = RowSource(name, key, prompt_row)
            # A response without an answer is scored at once, but not before the label was looked at.
            check = lambda label: scorer.score_many([("", label)])  # noqa: E731
            found.append(read_prompts(source, chat, data.max_prompt_tokens, ledger, check, progress))
    PromptOrder(len(found[0]), config.train.seed, config.rollout.prompts)  # raises where they do not fill a rollout
    return found


def make_scorer(reward: RewardSection) -> "Scorer":
    """The recipe's reward."""
    from infir2.reward.dispatch import reward_for

    options: dict[str, Any] = {"think": reward.think}
    if reward.kind == "code":
        from infir2.reward.sandbox import Limits

        options["limits"] = Limits(wall_s=reward.limit_s)
    elif reward.kind != "choice":
        options["limit_s"] = reward.limit_s
    if reward.workers and reward.kind != "choice":
        options["workers"] = reward.workers
    if reward.file is not None:
        options["file"] = reward.file
    return reward_for(reward.kind, **options)


def _data_lines(config: RlConfig, data: "Sequence[PromptSet]") -> list[str]:
    """What the data hold, for people."""
    from infir2.launch.data_check import check_held_out

    lines = [f"{name}: {len(p):,} prompts of {p.counts.summary()}" for name, p in zip(("train", "validation"), data)]
    rollout, train = config.rollout, config.train
    return [
        *lines,
        f"{train.steps:,} optimiser steps, {config.updates} a rollout of {rollout.prompts} prompts x {rollout.samples} "
        f"samples; {train.steps // config.updates * rollout.prompts / len(data[0]):.2f} passes over the prompts",
        *check_held_out(config.data),
    ]
