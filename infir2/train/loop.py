"""The trainer loop: batches -> step -> metrics -> evaluation -> checkpoint, for every stage that trains.

It knows no stage, no data format and no checkpoint format: the batches are fed by an iterator, evaluation and saving
are callbacks. The only state it owns is ``TrainState``.
"""

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infir2.config import LogSection, TrainSection
from infir2.errors import TrainingStopped
from infir2.fp8.health import measure
from infir2.parallel.runtime import World
from infir2.train.collection import collecting_between_steps
from infir2.train.graphs import Graphs
from infir2.train.interrupt import Interrupt
from infir2.train.metrics import MetricsWriter
from infir2.train.optimizer import set_learning_rate
from infir2.train.peak import peak_tflops
from infir2.train.step import AttentionFor, Objective, StepResult, cross_entropy, train_step, trial_pass
from infir2.types import Batch

_HEALTH_TOKENS = 4096  # millions of elements of every operand: enough to look at, and a pass that is soon over


@dataclass
class TrainState:
    """Where a run stands; saved in every checkpoint."""

    step: int = 0
    """Optimiser steps done, skipped ones included."""
    tokens: int = 0
    """Trained-on tokens seen."""
    skipped: int = 0
    """Steps skipped for a non-finite loss or gradient."""
    skipped_in_a_row: int = 0

    def to_json(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Feed:
    """What a stage trains on, and how."""

    batches: Callable[[int, int, Callable[[], object]], Iterator[Sequence[Batch]]]
    """(first step, last step, interrupted) -> this rank's micro-batches of each step, steps counted from 1, last
    included. Who takes long to make them may ask ``interrupted()``, and end on a true answer, all ranks together: it
    tells of this process alone."""
    attention_for: AttentionFor
    objective: Objective = cross_entropy
    step_values: Callable[[int, StepResult], Mapping[str, float]] = lambda step, result: {}
    """More numbers for the next line of metrics, asked for right after every step; of those of steps without a line the
    newest stand on the next one."""
    together: int = 1
    """Steps that share what cannot be made again after a resume: the state is saved, and a signal obeyed, only where a
    multiple of them is done."""


@dataclass(frozen=True)
class LoopSettings:
    """How long the loop runs, by which schedule, and what it tells of itself."""

    train: TrainSection
    learning_rate: Callable[[int], float]
    """Step (1-based) -> learning rate."""
    clip: float
    """Largest gradient norm; 0 = any."""
    flops_per_token: Callable[[float], float]
    """Mean number of positions that a token attends to -> model FLOPs."""
    log: LogSection = field(default_factory=LogSection)
    health_every: int = 0
    """Steps between two looks at FP8 health (0 = none)."""
    trace_folder: Path | None = None
    """Where traces of the profiler go."""


@dataclass(frozen=True)
class Callbacks:
    """What the loop asks of others: results on held-out data, and checkpoints. As it stands it gives and keeps none."""

    evaluate: Callable[[Callable[[], object]], Mapping[str, float]] = lambda interrupted: {}
    """Held-out results now. Who takes long may ask the function that is given, and return nothing on a true answer: on
    all ranks, though it tells of this process alone."""
    save: Callable[[TrainState], None] = lambda progress: None
    """Save a checkpoint of everything."""
    poll: Callable[[], None] = lambda: None
    """Raise if a save in the background failed."""
    finish: Callable[[], None] = lambda: None
    """Return when every save is on disk; raise if one failed."""


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: TrainState,
    feed: Feed,
    settings: LoopSettings,
    callbacks: Callbacks,
    world: World,
    metrics: MetricsWriter,
    graphs: Graphs | None = None,
) -> signal.Signals | None:
    """Train from ``progress.step`` to the last step. Returns the signal that ended it early, else None.

    SIGTERM, SIGINT and SIGHUP are obeyed between two micro-batches (but see ``Feed.together``): the step that was begun
    is dropped, the last finished one is saved and the call returns. Raises TrainingStopped after ``max_skipped_steps``
    skipped steps in a row or where more than half of the steps were skipped at the end, and on all ranks what a
    background save or the metrics of one of them raise.
    """
    config, saved = settings.train, progress.step
    log = _StepLog(metrics, feed, settings, world)
    with (
        Interrupt(world, callbacks.poll, callbacks.finish) as interrupt,
        _profiler(settings.log.profile_steps, settings.trace_folder, progress.step, world.rank) as profiler,
        collecting_between_steps() as collect,
    ):
        for batches in feed.batches(progress.step + 1, config.steps, interrupt.noticed):
            step = progress.step + 1
            lr = settings.learning_rate(step)
            set_learning_rate(optimizer, lr)
            health = _fp8_health(model, batches[0], world, feed, graphs) if _looks_at_health(settings, step) else {}
            interrupted = interrupt.check if progress.step % feed.together == 0 else lambda: None
            result = train_step(
                model, optimizer, batches, world, feed.attention_for, settings.clip, interrupted, feed.objective, graphs
            )
            if result is None:
                break
            _advance(progress, result)
            if profiler is not None:
                profiler.step()
            last = step == config.steps
            with interrupt.deferring():
                log.write(progress, result, lr, health, last)
            _check_skips(progress, result, config.max_skipped_steps, last)
            if config.eval_every and (step % config.eval_every == 0 or last):
                _evaluate(callbacks, step, last, interrupt, metrics)
            if last or (config.save_every and step % config.save_every == 0):
                callbacks.save(progress)
                saved = step
            collect(step)
            log.start_step()
        stopped = interrupt.check()
        if progress.step == config.steps:
            stopped = None  # too late to cut anything short
        if stopped and progress.step > saved:
            callbacks.save(progress)
        callbacks.finish()  # here, where a signal cannot cut the last save short
        if stopped:
            metrics.event(progress.step, "stopped", signal=stopped.name)
    return stopped


def _looks_at_health(settings: LoopSettings, step: int) -> bool:
    return settings.health_every > 0 and (step == 1 or step % settings.health_every == 0)


def _advance(progress: TrainState, result: StepResult) -> None:
    progress.step += 1
    progress.tokens += result.valid_tokens
    progress.skipped += result.skipped
    progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if result.skipped else 0


def _evaluate(callbacks: Callbacks, step: int, last: bool, interrupt: Interrupt, metrics: MetricsWriter) -> None:
    # Behind the last step nothing would make up for an evaluation that was given up.
    held_out = callbacks.evaluate((lambda: None) if last else interrupt.noticed)
    if not held_out:
        interrupt.check()  # given up for a failure, it ends here on every rank, not on one of them in the next save
    with interrupt.deferring():
        if held_out:
            metrics.log(step, held_out, kind="eval")


def _check_skips(progress: TrainState, result: StepResult, limit: int, last: bool) -> None:
    """Raise TrainingStopped after too many skipped steps in a row, be they only most of those of a short run."""
    mostly = last and 2 * progress.skipped_in_a_row > progress.step
    if progress.skipped_in_a_row < limit and not mostly:
        return
    cure = "Lower optim.lr or start again from an earlier checkpoint with init.checkpoint"
    if progress.skipped == progress.step:
        cure = "No step was good, so the weights that training starts from may hold NaN or Inf, or not fit the data"
    raise TrainingStopped(
        f"step {progress.step}: {progress.skipped_in_a_row} steps in a row had a non-finite loss or gradient "
        f"(loss {result.loss:g}, gradient norm {result.grad_norm:g}); the weights are those of the last good step. "
        f"{cure}"
    )


class _StepLog:
    """Tells the metrics of every step. Its time is counted from the end of the one before."""

    def __init__(self, metrics: MetricsWriter, feed: Feed, settings: LoopSettings, world: World) -> None:
        self.metrics, self.feed, self.settings, self.world = metrics, feed, settings, world
        on_gpu = world.device.type == "cuda"
        self.peak = peak_tflops(torch.cuda.get_device_name(world.device)) if on_gpu else None
        self.more: dict[str, float] = {}
        """What the stage has told since the last line."""
        self.start_step()

    def start_step(self) -> None:
        self.began = time.perf_counter()

    def write(
        self,
        progress: TrainState,
        result: StepResult,
        lr: float,
        health: Mapping[str, Mapping[str, float]],
        last: bool,
    ) -> None:
        """After a step: its health, where there is any, and its line, where it gets one."""
        step = progress.step
        if health:
            self.metrics.health(step, health)
        self.more |= self.feed.step_values(step, result)
        if step % self.settings.log.every == 0 or result.skipped or last:
            self.metrics.log(step, self._line(progress, result, lr))
            self.more = {}
        if result.skipped:
            self.metrics.event(step, "skip", loss=result.loss, grad_norm=result.grad_norm)

    def _line(self, progress: TrainState, result: StepResult, lr: float) -> dict[str, float]:
        """Losses, throughput and memory of the step that has just ended."""
        seconds = time.perf_counter() - self.began
        values: dict[str, float] = {
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens": progress.tokens,
            "valid_tokens": result.valid_tokens,
            "skipped": progress.skipped,
            "step_time_s": seconds,
            "tokens_per_s": result.tokens / seconds,
            **result.means,
            **self.more,
        }
        if self.peak is not None:
            flops = self.settings.flops_per_token(result.attended / result.tokens) * values["tokens_per_s"]
            values["mfu"] = flops / (self.peak * 1e12 * self.world.size)
        if self.world.device.type == "cuda":
            values["peak_memory_gb"] = torch.cuda.max_memory_allocated(self.world.device) / 1e9
        return values


def _fp8_health(
    model: nn.Module, batch: Batch, world: World, feed: Feed, graphs: Graphs | None
) -> dict[str, dict[str, float]]:
    """FP8 health of every layer on the beginning of one micro-batch of this rank.

    Measured in a pass of its own, outside compiled code and graphs: training takes the same course whether it is
    watched or not.
    """
    beginning = batch.beginning(_HEALTH_TOKENS)
    if graphs is not None:
        graphs.attach_zeros()
    with torch.compiler.set_stance("force_eager"), measure(model) as health:
        looked_at = beginning if beginning.valid_tokens else batch
        trial_pass(model, looked_at, world, feed.attention_for, feed.objective)
    return health.layers()


@contextmanager
def _profiler(steps: int, folder: Path | None, first_step: int, rank: int) -> Iterator[Any]:
    """A torch profiler over ``steps`` steps after the third one; every rank writes its trace into the folder."""
    if not steps or folder is None:
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"trace-from-step-{first_step + 4:06d}-rank-{rank}.json"
    with torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=2, warmup=1, active=steps, repeat=1),
        on_trace_ready=lambda profile: profile.export_chrome_trace(str(path)),
    ) as profiler:
        yield profiler
