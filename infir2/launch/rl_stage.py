"""What reinforcement learning gives to the run that training.py wires: engine, reward and loop around its model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from infir2.config import RlConfig
from infir2.data.chat import ChatTokenizer
from infir2.data.prompts import PromptSet, order_fingerprint
from infir2.data.tokenizer import load_tokenizer
from infir2.errors import DataError
from infir2.launch.rl_reference import reference_model
from infir2.launch.run_folder import keep_tokenizer
from infir2.launch.stage_data import StageData
from infir2.model.attention import document_attention
from infir2.model.config import ModelConfig
from infir2.model.transformer import CausalLM
from infir2.parallel.ranks import Ranks
from infir2.parallel.runtime import World
from infir2.reward.python_file import digest
from infir2.reward.score import Scorer
from infir2.rl.collect import Collector
from infir2.rl.loop import RlLoop
from infir2.rl.objective import PolicyObjective
from infir2.rl.samples import SampleLog
from infir2.rollout.engine import Engine
from infir2.rollout.options import EngineOptions
from infir2.train.loop import Feed, TrainState
from infir2.train.metrics import MetricsWriter, read_metrics
from infir2.types import Batch

_PATIENCE = timedelta(hours=6)
"""How long a process that has sampled its share waits for the others: some may have drawn all the long ones."""


@dataclass
class RlStage:
    """A run of a recipe. Its engine and loop are made when training begins, around the model that is trained."""

    config: RlConfig
    architecture: ModelConfig
    chat: ChatTokenizer
    tokenizer: Path
    data: Sequence[PromptSet]
    scorer: Scorer
    world: World
    _loop: RlLoop = field(init=False)
    _progress: TrainState = field(init=False)

    def stage_data(self) -> StageData:
        """What training gets from here."""
        config = self.config
        feed = Feed(
            batches=lambda first, last, interrupted: self._loop.batches(first, last, interrupted),
            attention_for=self._attention_for,
            objective=PolicyObjective(config.policy, config.rollout.temperature),
            step_values=lambda step, result: self._loop.step_values(step, result),
            together=config.updates,
        )
        return StageData(
            loop=config.train.loop(),
            feed=lambda used: feed,
            fingerprint=order_fingerprint(self.data[0], config.train.seed, config.rollout.prompts),
            order_keys="prompts, labels, tokenizer, chat template, rollout.prompts or seed",
            files={"reward.file": digest(config.reward.file)} if config.reward.file else {},
            continues=False,
            begin=self._begin,
            evaluate=lambda interrupted: self._loop.evaluate(self._progress.step, interrupted),
            summary={name: len(prompts) for name, prompts in zip(("prompts", "held_out"), self.data)},
            write=lambda run: keep_tokenizer(self.tokenizer, run, self.chat.template),
        )

    def _begin(self, model: CausalLM, progress: TrainState, metrics: MetricsWriter) -> None:
        """Make engine, collector and loop; evaluate before the first step of a run, or what a signal cut short."""
        config, ranks = self.config, Ranks(_PATIENCE)
        if len(set(ranks.each(lambda: tuple(prompts.sha256() for prompts in self.data)))) > 1:
            raise DataError("data: the processes have read different prompts; give every host the same files")
        tokenizer = load_tokenizer(self.tokenizer)
        engine = Engine(model, tokenizer, engine_options(config), weight_version=progress.step)
        stop_ids = {i for i in (self.chat.end_of_turn(), tokenizer.eos_token_id) if i is not None}
        collector = Collector(
            engine,
            self.scorer,
            config.rollout,
            config.reward,
            sorted(stop_ids),
            config.train.seed,
            metrics.activity,
            ranks,
        )
        owed = ranks.lead(lambda: _evaluation_owed(config, progress.step))
        reference = None
        if config.policy.kl_coef:
            reference = reference_model(config, self.architecture, self.world, model, progress.step, metrics, ranks)
        log = partial(SampleLog, Path(config.run), progress.step, evaluates_again=owed, enabled=self.world.is_main)
        self._progress = progress
        self._loop = RlLoop(
            config=config,
            model=model,
            engine=engine,
            collector=collector,
            prompts=self.data[0].prompts,
            held_out=self.data[1].prompts if len(self.data) > 1 else (),
            attention_for=self._attention_for,
            reference=reference,
            metrics=metrics,
            samples=ranks.each(log)[ranks.rank],  # where the file cannot be written, all end
        )
        if owed:
            held_out = self._loop.evaluate(progress.step)
            ranks.lead(lambda: metrics.log(progress.step, held_out, kind="eval"))

    def _attention_for(self, batch: Batch) -> Callable:
        return document_attention(batch, getattr(torch, self.config.model.dtype))


def _evaluation_owed(config: RlConfig, step: int) -> bool:
    """Whether the weights of ``step``, which training goes on from, should have been evaluated and were not."""
    if not config.train.eval_every or step % config.train.eval_every:
        return False
    lines = read_metrics(Path(config.run) / "metrics.jsonl")
    return not any((line["kind"], line["step"]) == ("eval", step) for line in lines)


def engine_options(config: RlConfig) -> EngineOptions:
    """The sizes of the recipe's engine."""
    rollout = config.rollout
    return EngineOptions(
        cache_tokens=rollout.cache_tokens,
        max_sequences=rollout.max_sequences,
        max_batch_tokens=rollout.max_batch_tokens,
        # Block tables are as wide as the longest sequence: not as wide as all positions that the model has.
        max_length=config.data.max_prompt_tokens + max(rollout.max_new_tokens, config.eval.max_new_tokens),
        cache_dtype=rollout.cache_dtype,
    )
