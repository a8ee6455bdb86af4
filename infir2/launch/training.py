"""What every training stage wires alike: the model and its optimiser, checkpoints, resume, metrics, the loop.

``run_training`` is a whole run in its folder; ``train_stage`` is the loop alone, for who keeps nothing.
"""

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from infir2.checkpoint.state import model_state, optimizer_state
from infir2.checkpoint.store import CheckpointStore
from infir2.config import TrainingConfig
from infir2.fp8.convert import SwapReport, refresh_weights
from infir2.launch.held_folder import writing
from infir2.launch.memory import enough_for_training
from infir2.launch.model import build_model
from infir2.launch.restore import Start, restore
from infir2.launch.run_folder import locked, write_run_record
from infir2.launch.stage_data import StageData
from infir2.model.config import ModelConfig
from infir2.model.transformer import CausalLM
from infir2.parallel.runtime import World
from infir2.train.graphs import Graphs, can_record
from infir2.train.loop import Callbacks, LoopSettings, TrainState, train
from infir2.train.metrics import MetricsWriter
from infir2.train.optimizer import build_optimizer
from infir2.train.schedule import learning_rate
from infir2.train.step import cross_entropy_of_fp8_head, evaluate


@dataclass(frozen=True)
class Trainee:
    """What is trained."""

    model: CausalLM
    optimizer: torch.optim.Optimizer
    report: SwapReport
    """Which layers are in FP8."""

    def tensors(self) -> dict[str, Any]:
        """What a checkpoint of it holds; loading into them loads model and optimiser in place."""
        return {"model": model_state(self.model), "optim": optimizer_state(self.model, self.optimizer)}


def build_trainee(config: TrainingConfig, architecture: ModelConfig, world: World) -> Trainee:
    """A recipe's model with its first weights, and its optimiser; seeds torch. FP8 codes are still to be made."""
    seed_everything(config)
    model, report = build_model(config, architecture, world)
    return Trainee(model, build_optimizer(model, config.optim), report)


def run_training(
    config: TrainingConfig, world: World, data: StageData, architecture: ModelConfig, tokenizer: Path | None
) -> signal.Signals | None:
    """Train one stage, resuming where its run folder says. Returns the signal that ended it early, if any."""
    run, settings = Path(config.run), data.loop
    with locked(run, world), enough_for_training(config):
        trainee = build_trainee(config, architecture, world)
        keep = (settings.keep_checkpoints, settings.keep_every, settings.async_save)
        with CheckpointStore(run / "checkpoints", *keep) as store:
            start = restore(config, store, trainee.tensors(), architecture, data)
            if (done := start.progress.step) >= settings.steps:
                if world.is_main:
                    print(f"{run}: already finished ({done} of {settings.steps} steps); infir2 report {run} shows it")
                return None
            data.check(run)
            refresh_weights(trainee.model)  # the codes of the first forward pass
            if world.is_main:
                with writing(run):
                    write_run_record(config, run, trainee.report, world)
                    data.write(run)
                print(trainee.report)
            with _open_metrics(config, world, start, data) as metrics:
                saver = Saver(store, trainee, metrics, _facts(config, data, start, architecture, tokenizer))
                stopped = train_stage(config, world, data, trainee, metrics, start, saver)
            if world.is_main and stopped is None:
                print(_closing_line(run, start.progress, metrics.newest))
            return stopped


def train_stage(
    config: TrainingConfig,
    world: World,
    data: StageData,
    trainee: Trainee,
    metrics: MetricsWriter,
    start: Start | None = None,
    saver: "Saver | None" = None,
) -> signal.Signals | None:
    """The loop, from where ``start`` stands to the last step or a signal; without ``saver`` no checkpoint is made."""
    start, settings, model = start or Start(), data.loop, trainee.model
    feed = data.feed(start.data_offset)
    if config.fp8.head:
        feed = replace(feed, objective=cross_entropy_of_fp8_head)
    held_out = data.held_out() if settings.eval_every else []
    graphs = Graphs(model) if settings.cuda_graphs and can_record(world) else None
    look = data.evaluate or (lambda _: {"eval_loss": evaluate(model, held_out, world, feed.attention_for, graphs)})
    callbacks = Callbacks(look, saver.save, saver.poll, saver.finish) if saver else Callbacks(look)
    data.begin(model, start.progress, metrics)
    plan = _loop_settings(config, data, trainee)
    return train(model, trainee.optimizer, start.progress, feed, plan, callbacks, world, metrics, graphs)


def _loop_settings(config: TrainingConfig, data: StageData, trainee: Trainee) -> LoopSettings:
    architecture, steps = trainee.model.config, data.loop.steps
    return LoopSettings(
        train=data.loop,
        log=config.log,
        clip=config.optim.clip,
        learning_rate=lambda step: learning_rate(step, steps, config.optim),
        flops_per_token=lambda span: architecture.flops_per_token(0, span),
        health_every=config.fp8.health_every if trainee.report.converted else 0,
        trace_folder=Path(config.run) / "profile",
    )


def _facts(
    config: TrainingConfig, data: StageData, start: Start, architecture: ModelConfig, tokenizer: Path | None
) -> dict[str, Any]:
    """What meta.json holds beside the progress: the same over the whole run."""
    return {
        "data": data.fingerprint,
        "files": dict(data.files),
        "data_offset": start.data_offset,
        "global_batch": data.loop.global_batch,
        "steps": data.loop.steps,
        "architecture": architecture.to_hf(),
        "tokenizer": str(tokenizer.resolve()) if tokenizer else None,
        "config": config.model_dump(mode="json"),
    }


def _open_metrics(config: TrainingConfig, world: World, start: Start, data: StageData) -> MetricsWriter:
    """The run's metrics, with the events of its start written."""
    run = Path(config.run)
    metrics = MetricsWriter(
        run,
        data.loop.steps,
        tensorboard=config.log.tensorboard,
        wandb_project=config.log.wandb_project,
        first_step=start.progress.step,
        name=run.name,
        enabled=world.is_main,
    )
    for event, details in start.events:
        metrics.event(start.progress.step, event, **details)
    if data.summary:
        metrics.event(start.progress.step, "data", **data.summary)
    return metrics


def _closing_line(run: Path, progress: TrainState, values: Mapping[str, float]) -> str:
    """How a run ended, and where to look at it."""
    names = {"reward": "reward", "eval_reward": "held-out reward", "loss": "loss", "eval_loss": "held-out loss"}
    if late := progress.skipped_in_a_row:
        del names["loss"]  # no number
    shown = [f"{name} {values[key]:.4f}" for key, name in names.items() if key in values]
    line = ", ".join([f"done: {progress.step} steps", *shown])
    if progress.skipped:
        end = f", the last {late} among them: the weights are those of step {progress.step - late}" if late else ""
        line += f"; {progress.skipped} steps were skipped for a non-finite loss or gradient{end}"
    return f"{line}; infir2 report {run} shows it"


@dataclass(frozen=True)
class Saver:
    """Saves everything a resume needs, and tells the metrics of each checkpoint once it is on disk."""

    store: CheckpointStore
    trainee: Trainee
    metrics: MetricsWriter
    facts: dict[str, Any]

    def save(self, at: TrainState) -> None:
        self.finish()  # the one before is told of, whatever becomes of this one
        self.metrics.sync()
        self.store.save(at.step, self.trainee.tensors(), {"progress": at.to_json(), **self.facts})

    def poll(self) -> None:
        self._tell(self.store.poll())

    def finish(self) -> None:
        self._tell(self.store.wait())

    def _tell(self, saved: Sequence[int]) -> None:
        for step in saved:
            self.metrics.event(step, "checkpoint", path=str(self.store.folder(step)))


def seed_everything(config: TrainingConfig) -> None:
    """Seed torch, and ask for deterministic kernels where the recipe does."""
    torch.manual_seed(config.train.seed)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
