"""The reinforcement-learning loop: sample, score, choose groups, then hand micro-batches to the trainer's own loop.

The trainer's loop (infir2.train.loop) asks for the micro-batches of its next optimiser step; this is where they come
from. Steps that share a rollout follow each other, and nothing is saved between them. Trainer and engine meet in two
places only: samples go to the trainer in infir2.rl.batch, weights to the engine in infir2.rl.weight_sync.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from infir2.config import RlConfig
from infir2.data.prompts import Prompt, PromptOrder
from infir2.model.transformer import CausalLM
from infir2.parallel.device import wait_for
from infir2.rl.advantage import group_advantages
from infir2.rl.batch import RlBatch, TrainingSample, dealt, pack_samples, split_samples, with_logprobs
from infir2.rl.collect import Collector, Group, Interrupted, Rollout
from infir2.rl.objective import batch_logprobs
from infir2.rl.samples import SampleLog
from infir2.rl.weight_sync import sync_weights
from infir2.rollout.interface import RolloutEngine
from infir2.rollout.records import SamplingParams
from infir2.train.metrics import MetricsWriter
from infir2.train.step import AttentionFor, StepResult

SHOWN = 2
"""Completions of a rollout, and of an evaluation, that are written down."""


@dataclass
class RlLoop:
    """One run. The engine is asleep but while it samples. Of several processes each holds the whole model, samples its
    share of the prompts, sees all groups, and learns from its share of the micro-batches."""

    config: RlConfig
    model: CausalLM
    engine: RolloutEngine
    collector: Collector
    prompts: Sequence[Prompt]
    held_out: Sequence[Prompt]
    attention_for: AttentionFor
    reference: CausalLM | None
    """Frozen; None where policy.kl_coef is 0."""
    metrics: MetricsWriter
    samples: SampleLog

    def __post_init__(self) -> None:
        self.order = PromptOrder(len(self.prompts), self.config.train.seed, self.config.rollout.prompts)
        self._values: dict[str, float] = {}
        self._handed_out = 0.0
        if self.engine.capabilities.logprobs == "raw" and self.config.rollout.temperature != 1:
            raise ValueError(
                "this engine gives log-probabilities at temperature 1 only: they are not those it draws with"
            )
        self.engine.sleep()

    def batches(self, first: int, last: int, interrupted: Callable[[], object]) -> Iterator[list[RlBatch]]:
        """Micro-batches of optimiser steps ``first`` to ``last``; ``first`` begins a rollout."""
        updates = self.config.updates
        for step in range(first, last + 1, updates):
            try:
                rollout = self._sample(step - 1, interrupted)
            except Interrupted:
                return
            self.collector.ranks.lead(partial(self._write_down, step, rollout))
            shares = self._training_batches(rollout)
            self._values = self._describe(step, rollout)
            for share in shares:
                self._handed_out = time.perf_counter()
                yield share

    def step_values(self, step: int, result: StepResult) -> dict[str, float]:
        """Numbers for the next line of metrics: those of a rollout come after its first step. Raises the alarm where
        trainer and engine disagree."""
        values, self._values = self._values, {}
        self._wait_for_device()
        values["update_s"] = time.perf_counter() - self._handed_out
        error, limit = result.means["token_mult_prob_error"], self.config.policy.mismatch_limit
        if error > limit:
            self.metrics.event(
                step,
                "mismatch",
                token_mult_prob_error=error,
                limit=limit,
                meaning="trainer and engine give the sampled tokens different probabilities; samples may mislead the "
                "trainer. Look at the recipe's precision, or at weights that did not reach the engine",
            )
        return values

    def evaluate(self, step: int, interrupted: Callable[[], object] = lambda: None) -> dict[str, float]:
        """Mean reward of the held-out prompts, without shaping, with the weights of now; nothing where interrupted."""
        settings, config = self.config.eval, self.config
        rows = list(enumerate(self.held_out[: config.train.eval_sequences]))
        params = SamplingParams(
            temperature=settings.temperature,
            max_new_tokens=settings.max_new_tokens or config.rollout.max_new_tokens,
            n=settings.samples,
            stop_token_ids=self.collector.stop_ids,
        )
        seconds: defaultdict[str, float] = defaultdict(float)
        sync_weights(self.model, self.engine, step)
        self.engine.wake()
        try:
            groups = self.collector.sample(rows, params, "eval", seconds, interrupted)
        except Interrupted:
            return {}
        finally:
            self.engine.sleep()
        self.collector.ranks.lead(lambda: self.samples.write(step, "eval", groups[:SHOWN]))
        return {
            "eval_reward": fmean(score.value for group in groups for score in group.scores),
            **{f"eval_{name}": value for name, value in _lengths(groups).items()},
            "eval_s": sum(seconds.values()),
        }

    def _sample(self, steps_done: int, interrupted: Callable[[], object]) -> Rollout:
        """The rollout that follows ``steps_done`` optimiser steps, by the weights of now."""
        self._wait_for_device()
        began = time.perf_counter()
        sync_weights(self.model, self.engine, steps_done)
        self.engine.wake()
        self._wait_for_device()
        synced = time.perf_counter()
        try:
            number = steps_done // self.config.updates
            rollout = self.collector.collect(self.prompts, self.order, number, interrupted)
        finally:
            self.engine.sleep()
        rollout.seconds["sync_s"] += synced - began
        return rollout

    def _wait_for_device(self) -> None:
        """Between phases, so that each is charged with its own work and not with that of the one before."""
        wait_for(self.model.lm_head.weight.device)

    def _training_batches(self, rollout: Rollout) -> list[list[RlBatch]]:
        """This process's micro-batches of each optimiser step, with what stays fixed over them of log-probabilities."""
        began = time.perf_counter()
        config, temperature = self.config, self.config.rollout.temperature
        samples = [sample for group in rollout.kept for sample in training_samples(group, config)]
        packed = [pack_samples(s, config.data.max_tokens_per_gpu) for s in split_samples(samples, config.updates)]
        ranks = self.collector.ranks
        shares = [dealt(batches, ranks.rank, ranks.size) for batches in packed]
        passes = [("old", self.model)] * (config.updates > 1) + [("reference", self.reference)]
        for name, model in passes:
            if model is not None:
                compute = partial(batch_logprobs, model, attention_for=self.attention_for, temperature=temperature)
                shares = [[with_logprobs(batch, name, compute) for batch in share] for share in shares]
        rollout.seconds["logprob_s"] += time.perf_counter() - began
        return shares

    def _write_down(self, step: int, rollout: Rollout) -> None:
        """A few samples, and an event where none of them teaches anything: what may fail, for want of room."""
        self.samples.write(step, "train", rollout.kept[:SHOWN])
        if not any(group.has_spread for group in rollout.sampled):
            groups = len(rollout.sampled)
            self.metrics.event(step, "no_spread", groups=groups, meaning="no group has scores that differ")

    def _describe(self, step: int, rollout: Rollout) -> dict[str, float]:
        """The rollout's numbers, for the metrics."""
        groups = rollout.sampled
        tokens = sum(len(c.token_ids) for group in groups for c in group.completions)
        versions = {version for group in groups for c in group.completions for version in c.versions}
        return {
            "reward": fmean(reward for group in groups for reward in group.rewards),
            "accuracy": fmean(score.value for group in groups for score in group.scores),
            **_lengths(groups),
            "sampled_groups": len(groups),
            "kept_groups": len(rollout.kept),
            "groups_with_spread": sum(group.has_spread for group in groups),
            "rollout_tokens_per_s": tokens / rollout.seconds["rollout_s"],
            "version_lag": step - 1 - min(versions),
            **{name: rollout.seconds[name] for name in ("rollout_s", "reward_s", "logprob_s", "sync_s")},
        }


def training_samples(group: Group, config: RlConfig) -> list[TrainingSample]:
    """The samples of a group with their advantages."""
    advantages = group_advantages(group.rewards, config.policy.std_normalization)
    return [
        TrainingSample(group.prompt.ids, completion.token_ids, completion.logprobs, advantage)
        for completion, advantage in zip(group.completions, advantages)
    ]


def _lengths(groups: Sequence[Group]) -> dict[str, float]:
    completions = [completion for group in groups for completion in group.completions]
    return {
        "response_length": fmean(len(completion.token_ids) for completion in completions),
        "truncated": fmean(completion.finish_reason == "length" for completion in completions),
    }
