"""Reinforcement learning on prompts with checkable answers: `infir2 rl RECIPE [--section.key value ...]`.

GRPO with DAPO's refinements: groups of samples from the embedded engine, which shares the trainer's weights; rewards;
one or more optimiser steps; again. Run the same command again to resume. Stage 1 names a fine-tuning run under
init.checkpoint, stage 2 names stage 1's. --dry-run reads the prompts and shows what would be run.
"""

import argparse
import signal
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infir2.config import RewardSection, RlConfig, load
from infir2.errors import CheckpointError, ConfigError
from infir2.launch.recipe_arguments import add_recipe_arguments

if TYPE_CHECKING:
    from infir2.data.chat import ChatTokenizer
    from infir2.data.prompts import PromptSet
    from infir2.launch.stage_data import StageData
    from infir2.model.config import ModelConfig
    from infir2.model.transformer import CausalLM
    from infir2.parallel.runtime import World
    from infir2.reward.score import Scorer
    from infir2.rl.loop import RlLoop
    from infir2.rollout.options import EngineOptions
    from infir2.train.loop import TrainState
    from infir2.train.metrics import MetricsWriter

ACCEPTS_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser, RlConfig, "rl_tiny_stage1.toml")


def run(args: argparse.Namespace) -> int:
    from infir2.launch.run_folder import exit_code
    from infir2.parallel.runtime import world

    config = load(RlConfig, args.recipe, args.overrides)
    with world(config.parallel.replicate) as here:
        if here.size > 1:
            raise ConfigError("infir2 rl trains and samples in one process on one device; start it without torchrun")
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
        data = missing.attempt(read_data, config, opened[0], make_scorer(config.reward), True)
        lines = _data_lines(config, data) if data is not None else []
    architecture, note = (opened[2], "") if opened is not None else likely_architecture(config)
    train, (longest, _) = config.train, config.longest
    work = Workload(train.steps, train.steps * train.global_batch * longest, config.data.max_tokens_per_gpu)
    text = missing.attempt(describe_run, config, architecture, world.size, work) if architecture else None
    cache = _cache_line(config, architecture) if architecture else ""
    print("\n".join(filter(None, (text or to_toml(config), cache, note, *lines))))
    missing.tell()


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
    from infir2.launch.run_folder import check_start
    from infir2.launch.training import run_training

    check_start(config, world)
    chat, tokenizer, architecture = open_policy(config)
    with closing(make_scorer(config.reward)) as scorer:
        data = read_data(config, chat, scorer, show_progress=world.is_main)
        print("\n".join(_data_lines(config, data)))
        stage = Wiring(config, architecture, chat, tokenizer, data, scorer, world).stage()
        return run_training(config, world, stage, architecture, Path(config.run) / "tokenizer")


@dataclass
class Wiring:
    """Puts the loop together once the model is there."""

    config: RlConfig
    architecture: "ModelConfig"
    chat: "ChatTokenizer"
    tokenizer: Path
    data: "Sequence[PromptSet]"
    scorer: "Scorer"
    world: "World"
    loop: "RlLoop" = field(init=False)
    progress: "TrainState" = field(init=False)

    def stage(self) -> "StageData":
        """What training gets from here; engine and loop are made when it begins."""
        import torch

        from infir2.data.prompts import order_fingerprint
        from infir2.launch.run_folder import keep_tokenizer
        from infir2.launch.stage_data import StageData
        from infir2.model.attention import document_attention
        from infir2.rl.objective import PolicyObjective
        from infir2.train.loop import Feed

        config, dtype = self.config, getattr(torch, self.config.model.dtype)
        feed = Feed(
            batches=lambda first, last, interrupted: self.loop.batches(first, last, interrupted),
            attention_for=lambda batch: document_attention(batch, dtype),
            objective=PolicyObjective(config.policy, config.rollout.temperature),
            step_values=lambda step, result: self.loop.step_values(step, result),
            together=config.updates,
        )
        return StageData(
            loop=config.train.loop(),
            feed=lambda used: feed,
            fingerprint=order_fingerprint(self.data[0], config.train.seed, config.rollout.prompts),
            order_keys="prompts, labels, tokenizer, chat template, rollout.prompts or seed",
            continues=False,
            begin=self.begin,
            evaluate=lambda interrupted: self.loop.evaluate(self.progress.step, interrupted),
            summary={name: len(prompts) for name, prompts in zip(("prompts", "held_out"), self.data)},
            write=lambda run: keep_tokenizer(self.tokenizer, run, self.chat.template),
        )

    def begin(self, model: "CausalLM", progress: "TrainState", metrics: "MetricsWriter") -> None:
        """Make engine, collector and loop; evaluate before the first step of a run, or what a signal cut short."""
        import torch

        from infir2.data.tokenizer import load_tokenizer
        from infir2.model.attention import document_attention
        from infir2.rl.collect import Collector
        from infir2.rl.loop import RlLoop
        from infir2.rl.samples import SampleLog
        from infir2.rollout.engine import Engine

        config = self.config
        tokenizer = load_tokenizer(self.tokenizer)
        engine = Engine(model, tokenizer, engine_options(config), weight_version=progress.step)
        stop_ids = {i for i in (self.chat.end_of_turn(), tokenizer.eos_token_id) if i is not None}
        collector = Collector(
            engine, self.scorer, config.rollout, config.reward, sorted(stop_ids), config.train.seed, metrics.activity
        )
        dtype = getattr(torch, config.model.dtype)
        owed = evaluation_owed(config, progress.step)
        reference = None
        if config.policy.kl_coef:
            reference = reference_model(config, self.architecture, self.world, model, progress.step, metrics)
        self.progress = progress
        self.loop = RlLoop(
            config=config,
            model=model,
            engine=engine,
            collector=collector,
            prompts=self.data[0].prompts,
            held_out=self.data[1].prompts if len(self.data) > 1 else (),
            attention_for=lambda batch: document_attention(batch, dtype),
            reference=reference,
            metrics=metrics,
            samples=SampleLog(Path(config.run), progress.step, evaluates_again=owed),
        )
        if owed:
            metrics.log(progress.step, self.loop.evaluate(progress.step), kind="eval")


def evaluation_owed(config: RlConfig, step: int) -> bool:
    """Whether the weights of ``step``, which training goes on from, should have been evaluated and were not."""
    from infir2.train.metrics import read_metrics

    if not config.train.eval_every or step % config.train.eval_every:
        return False
    lines = read_metrics(Path(config.run) / "metrics.jsonl")
    return not any((line["kind"], line["step"]) == ("eval", step) for line in lines)


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
    return reward_for(reward.kind, **options)


def engine_options(config: RlConfig) -> "EngineOptions":
    from infir2.rollout.options import EngineOptions

    rollout = config.rollout
    return EngineOptions(
        cache_tokens=rollout.cache_tokens,
        max_sequences=rollout.max_sequences,
        max_batch_tokens=rollout.max_batch_tokens,
        # Block tables are as wide as the longest sequence: not as wide as all positions that the model has.
        max_length=config.data.max_prompt_tokens + max(rollout.max_new_tokens, config.eval.max_new_tokens),
        cache_dtype=rollout.cache_dtype,
    )


_CURE = "Put them back, or name other weights in the recipe and resume with --train.accept_changes true"


def reference_model(
    config: RlConfig,
    architecture: "ModelConfig",
    world: "World",
    model: "CausalLM",
    step: int,
    metrics: "MetricsWriter",
) -> "CausalLM":
    """The model that the run started from, frozen, whatever has been trained or saved since. ``model`` is the policy
    after ``step`` optimiser steps.

    Raises CheckpointError where the weights that the run has referred to so far are gone, changed or unknown.
    """
    from infir2.launch.model import start_model
    from infir2.rl.reference import FILE, Reference, read_reference, write_reference
    from infir2.rollout.checksum import weights_checksum

    run, named = Path(config.run), _start_named(config)
    known = read_reference(run) if step else None
    if known is not None and known.named != named:
        known = None  # a change of recipe that was accepted, else there would be no resume
    if step and known is None and not config.train.accept_changes:
        raise CheckpointError(
            f"{run / FILE}: does not say which weights the KL term has referred to so far; to take those of {named} as "
            "they are now, resume with --train.accept_changes true"
        )
    if known is not None and known.path is not None and not Path(known.path).is_dir():
        raise CheckpointError(f"{known.path}: the weights that the KL term of {run} refers to are gone. {_CURE}")
    reference, path = start_model(config, architecture, world, known.path if known else None)
    found = weights_checksum(reference, codes=False)
    if known is not None and found != known.checksum:
        raise CheckpointError(f"{path}: not the weights that the KL term of {run} has referred to so far. {_CURE}")
    if step == 0 and found != weights_checksum(model, codes=False):
        raise CheckpointError(f"{named}: other weights were put there while the run started; start it again")
    if known is None:
        write_reference(run, Reference(named, path, found))
        metrics.event(step, "reference", **{"from": path or named})
    return reference


def _start_named(config: RlConfig) -> str:
    """How the recipe names the weights that training starts from."""
    if config.init.checkpoint is not None:
        return f"init.checkpoint = {config.init.checkpoint}"
    if config.model.path is not None:
        return f"model.path = {config.model.path}"
    return f"model.preset = {config.model.preset}"


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
