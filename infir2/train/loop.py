"""The trainer loop: batches -> step -> metrics -> evaluation -> checkpoint, for every stage that trains.

It knows no stage, no data format and no checkpoint format: the batches come from an iterator, evaluation and saving
are callbacks. The only state it owns is ``Progress``.
"""

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infir2.config import LogSection, TrainSection
from infir2.errors import TrainingStopped
from infir2.fp8.health import measure
from infir2.parallel.runtime import World
from infir2.train.metrics import MetricsWriter
from infir2.train.optimizer import set_learning_rate
from infir2.train.step import AttentionFor, StepResult, train_step
from infir2.types import Batch

# Dense bfloat16 peak of one device in TFLOP/s (vendor data sheets): what MFU is measured against, in FP8 too.
_PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "H800": 989.0, "H20": 148.0, "A100": 312.0, "B200": 2250.0}


@dataclass
class Progress:
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
class Callbacks:
    """What the loop asks of the stage that runs it."""

    batches: Callable[[int, int], Iterator[Sequence[Batch]]]
    """(first step, last step) -> this rank's micro-batches of each step, steps counted from 1, last included."""
    learning_rate: Callable[[int], float]
    """Step (1-based) -> learning rate."""
    evaluate: Callable[[], float]
    """Held-out loss now."""
    save: Callable[[Progress], None]
    """Save a checkpoint of everything."""
    poll: Callable[[], None]
    """Raise if a save in the background failed."""
    finish: Callable[[], None]
    """Return when every save is on disk; raise if one failed."""
    attention_for: AttentionFor
    step_values: Callable[[int], Mapping[str, float]] = lambda step: {}
    """Step -> more numbers for its line of metrics. ``processed_tokens`` among them, where a step reads more tokens
    than it trains on, is what speed and FLOPs are counted for."""


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    config: TrainSection,
    world: World,
    metrics: MetricsWriter,
    callbacks: Callbacks,
    *,
    clip: float,
    flops_per_token: float,
    log: LogSection,
    health_every: int = 0,
    trace_folder: Path | None = None,
) -> bool:
    """Train from ``progress.step`` to ``config.steps``. Returns False where SIGTERM or SIGINT ended it early.

    A signal is obeyed at the end of the step: the state is saved and the call returns. Raises TrainingStopped after
    ``config.max_skipped_steps`` skipped steps in a row, and whatever a failed background save raises.
    """
    meter = _Meter(world, flops_per_token)
    with _StopSignal() as stop, _profiler(log.profile_steps, trace_folder, progress.step) as profiler:
        for batches in callbacks.batches(progress.step + 1, config.steps):
            step = progress.step + 1
            lr = callbacks.learning_rate(step)
            set_learning_rate(optimizer, lr)
            measured = health_every > 0 and (step == 1 or step % health_every == 0)
            with _measuring(model, metrics, step) if measured else nullcontext():
                result = train_step(
                    model, optimizer, batches, world, callbacks.attention_for, clip, stop_requested=stop.requested
                )
            _advance(progress, result)
            if profiler is not None:
                profiler.step()
            if step % log.every == 0 or result.skipped or step == config.steps:
                metrics.log(step, meter.read(progress, result, lr, callbacks.step_values(step)))
            if result.skipped:
                metrics.event(step, "skip", loss=result.loss, grad_norm=result.grad_norm)
            callbacks.poll()
            if progress.skipped_in_a_row >= config.max_skipped_steps:
                raise TrainingStopped(_too_many_skips(progress, result))
            last = step == config.steps
            if config.eval_every and (step % config.eval_every == 0 or last):
                metrics.log(step, {"eval_loss": callbacks.evaluate()}, kind="eval")
            stopping = result.stop_requested and not last
            if last or stopping or (config.save_every and step % config.save_every == 0):
                callbacks.save(progress)
            if stopping:
                callbacks.finish()
                metrics.event(step, "stopped")
                return False
            meter.start()
        callbacks.finish()  # here, where a signal cannot cut the last save short
    return True


def _advance(progress: Progress, result: StepResult) -> None:
    progress.step += 1
    progress.tokens += result.valid_tokens
    progress.skipped += result.skipped
    progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if result.skipped else 0


def _too_many_skips(progress: Progress, result: StepResult) -> str:
    return (
        f"step {progress.step}: {progress.skipped_in_a_row} steps in a row had a non-finite loss or gradient "
        f"(loss {result.loss:g}, gradient norm {result.grad_norm:g}); the weights are those of the last good step. "
        "Lower optim.lr or start again from an earlier checkpoint with init.checkpoint"
    )


class _Meter:
    """Time, throughput and memory of one step, counted from the end of the one before."""

    def __init__(self, world: World, flops_per_token: float) -> None:
        self.world, self.flops_per_token = world, flops_per_token
        self.peak = 0.0
        if world.device.type == "cuda":
            name = torch.cuda.get_device_name(world.device)
            self.peak = next((peak for key, peak in _PEAK_TFLOPS.items() if key in name), 0.0) * 1e12
        self.start()

    def start(self) -> None:
        self.began = time.perf_counter()

    def read(self, progress: Progress, result: StepResult, lr: float, more: Mapping[str, float]) -> dict[str, float]:
        seconds = time.perf_counter() - self.began
        values: dict[str, float] = {
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens": progress.tokens,
            "valid_tokens": result.valid_tokens,
            "skipped": progress.skipped,
            "step_time_s": seconds,
            "tokens_per_s": more.get("processed_tokens", result.valid_tokens) / seconds,
            **more,
        }
        if self.peak:
            flops = self.flops_per_token * values["tokens_per_s"]
            values["mfu"] = flops / (self.peak * self.world.size)
            values["peak_memory_gb"] = torch.cuda.max_memory_allocated(self.world.device) / 1e9
        return values


@contextmanager
def _measuring(model: nn.Module, metrics: MetricsWriter, step: int) -> Iterator[None]:
    """Measure FP8 health during one step, outside compiled code, and write it (this rank's tokens)."""
    with torch.compiler.set_stance("force_eager"), measure(model) as health:
        yield
    layers = health.layers()
    if layers:
        metrics.health(step, layers)


class _StopSignal:
    """SIGTERM and SIGINT ask for a stop at the next step boundary; a second SIGINT interrupts at once."""

    def __enter__(self) -> "_StopSignal":
        self.requested = False
        self._before: dict[int, Any] = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread: whoever runs this one handles signals
                break
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def _profiler(steps: int, folder: Path | None, first_step: int) -> Iterator[Any]:
    """A torch profiler over ``steps`` steps after the third one; its trace is written into the folder."""
    if not steps or folder is None:
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"trace-from-step-{first_step + 4:06d}.json"
    with torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=2, warmup=1, active=steps, repeat=1),
        on_trace_ready=lambda profile: profile.export_chrome_trace(str(path)),
    ) as profiler:
        yield profiler
