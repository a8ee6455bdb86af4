"""What every training stage wires alike: model, FP8 conversion, sharding, optimiser, checkpoints, resume, the loop."""

import dataclasses
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from infir2.checkpoint.huggingface import load_into, read_config
from infir2.checkpoint.state import model_state, optimizer_state
from infir2.checkpoint.store import CheckpointStore, peek_meta, read_meta
from infir2.config import Fp8Section, TrainingConfig, TrainSection
from infir2.data.tokenizer import has_tokenizer
from infir2.errors import CheckpointError, ConfigError
from infir2.fp8.convert import SwapReport, convert, keep_outer_layers, refresh_stale, refresh_weights
from infir2.fp8.recipe import recipe_named
from infir2.kernels.matmul import unsupported_reason
from infir2.launch.held_folder import writing
from infir2.launch.resume import changes_on_resume
from infir2.launch.run_folder import locked, write_run_record
from infir2.model.config import ModelConfig, from_hf
from infir2.model.presets import preset
from infir2.model.transformer import CausalLM
from infir2.parallel.apply import fill, parallelize
from infir2.parallel.runtime import World
from infir2.train.graphs import Graphs, can_record
from infir2.train.loop import Callbacks, TrainState, train
from infir2.train.metrics import MetricsWriter
from infir2.train.optimizer import build_optimizer
from infir2.train.schedule import learning_rate
from infir2.train.step import (
    AttentionFor,
    Objective,
    StepResult,
    cross_entropy,
    cross_entropy_of_fp8_head,
    evaluate,
)
from infir2.types import Batch


@dataclass(frozen=True)
class StageData:
    """What a stage's data give to the loop."""

    loop: TrainSection
    """The recipe's train section, with its number of steps."""
    batches: Callable[[int, int, int, Callable[[], object]], Iterator[Sequence[Batch]]]
    """(first step, last step, samples used before step 1, interrupted) -> this rank's micro-batches, steps from 1, last
    included (see Callbacks)."""
    held_out: Callable[[], Sequence[Batch]]
    """This rank's held-out batches; the same number on every rank."""
    attention_for: AttentionFor
    fingerprint: dict[str, Any]
    """Decides, by its key ``sha256``, whether a checkpoint was made with the same data in the same order."""
    order_keys: str = "sources, weights, seq_len or seed"
    """What in the recipe decides the fingerprint, for the message about one that changed."""
    continues: bool = True
    """Whether a run that starts from another run's checkpoint goes on where that one was in the same data."""
    step_values: Callable[[int, StepResult], Mapping[str, float]] = lambda step, result: {}
    """More numbers for a step's line of metrics (see Callbacks)."""
    objective: Objective = cross_entropy
    together: int = 1
    """Steps between two of which nothing can be saved (see Callbacks)."""
    begin: Callable[[CausalLM, TrainState, MetricsWriter], None] = lambda model, progress, metrics: None
    """Called once before the first step, when the model has the weights that training starts from."""
    evaluate: Callable[[Callable[[], object]], Mapping[str, float]] | None = None
    """Held-out results now (see Callbacks); None: the loss on ``held_out``."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """What the data hold, for an event in the metrics; empty = no event."""
    check: Callable[[Path], None] = lambda run: None
    """Looks, on every rank, at whether the files are whole; may remember in the run folder what it has seen."""
    write: Callable[[Path], None] = lambda run: None
    """Writes what the stage keeps in its run folder."""


def starting_meta(config: TrainingConfig) -> dict[str, Any] | None:
    """meta.json of the checkpoint that training starts from: the run's own newest, else that of [init], else None."""
    found = peek_meta(Path(config.run) / "checkpoints")
    return found or (peek_meta(config.init.checkpoint) if config.init.checkpoint else None)


def starting_tokenizer(config: TrainingConfig) -> Path | None:
    """Folder of the tokenizer that the weights which training starts from know; None for random or unknown ones."""
    meta = starting_meta(config)
    name = meta.get("tokenizer") if meta else config.model.path
    return Path(name) if name and has_tokenizer(Path(name)) else None


def no_start(config: TrainingConfig) -> CheckpointError:
    """That init.checkpoint names nothing to start from."""
    path = Path(config.init.checkpoint or "").expanduser()
    why = "" if path.is_dir() else ": there is no such folder"
    if (path / "config.json").exists():
        why = ": it looks like a Hugging Face folder, which model.path takes"
    return CheckpointError(f"{config.init.checkpoint}: no checkpoint to start from{why}")


def model_config(config: TrainingConfig, vocab_size: int) -> ModelConfig:
    """The architecture of a recipe; ``vocab_size`` is the tokenizer's, for presets that do not give their own.

    Where the model section names none, it is the architecture of the checkpoint that training starts from.
    """
    section = config.model
    if not section.is_named:
        meta = starting_meta(config)
        if meta is None:
            raise no_start(config)
        return from_hf(meta["architecture"], f"{config.init.checkpoint}: meta.json")
    if section.path is not None:
        return from_hf(read_config(section.path), f"{section.path}/config.json")
    rows = section.vocab_size or -(-vocab_size // 128) * 128
    return dataclasses.replace(preset(section.preset or "", rows), initializer_range=section.init_std)


def convert_as(model: CausalLM, fp8: Fp8Section) -> SwapReport:
    """Convert the linear layers of a model as a recipe's fp8 section says."""
    keep = keep_outer_layers(model.config.num_hidden_layers, fp8.bf16_first_layers, fp8.bf16_last_layers)
    if fp8.head:
        if reason := unsupported_reason(model.config.vocab_size, model.config.hidden_size):
            raise ConfigError(f"fp8.head: the output head is not fit for FP8 GEMMs ({reason}); leave it off")
        keep["lm_head."] = "fp8.head: the loss multiplies it in FP8, all else in bf16"
    return convert(model, recipe_named(fp8.recipe, fp8.scale_format), keep, fp8.mlp_activations)


def build_model(config: TrainingConfig, architecture: ModelConfig, world: World) -> tuple[CausalLM, SwapReport]:
    """The model of a recipe on this rank's device, converted, sharded and with its first weights.

    Where the model section names none the weights are still to be loaded from a checkpoint.
    """
    dtype = getattr(torch, config.model.dtype)
    with torch.device("meta"):
        model = CausalLM(architecture, dtype)
    names = [name for name, _ in model.named_parameters()]
    report = convert_as(model, config.fp8)
    parallelize(
        model,
        model.model.layers,
        world,
        gather_dtype=getattr(torch, config.parallel.gather_dtype),
        activation_checkpointing=config.train.activation_checkpointing,
        compile_layers=config.train.compile,
        reshard_after_forward=config.parallel.reshard_after_forward,
        when_gathered=refresh_stale,
    )
    model.to_empty(device=world.device)
    if config.model.path is not None:
        load_into(model, config.model.path)
    elif config.model.preset is not None:
        parameters = dict(zip(names, model.parameters(), strict=True))
        for name, value in model.initial_values(config.train.seed):
            fill(parameters[name], value)
    return model, report


def run_training(
    config: TrainingConfig, world: World, data: StageData, architecture: ModelConfig, tokenizer: Path | None
) -> signal.Signals | None:
    """Train one stage, resuming where its run folder says. Returns the signal that ended it early, if any."""
    run, settings = Path(config.run), data.loop
    with locked(run, world):
        seed_everything(config)
        model, report = build_model(config, architecture, world)
        optimizer = build_optimizer(model, config.optim)
        with CheckpointStore(
            run / "checkpoints", settings.keep_checkpoints, settings.keep_every, settings.async_save
        ) as store:
            state = {"model": model_state(model), "optim": optimizer_state(model, optimizer)}
            start = _restore(config, store, state, architecture, data)
            if (done := start.progress.step) >= settings.steps:
                if world.is_main:
                    print(f"{run}: already finished ({done} of {settings.steps} steps); infir2 report {run} shows it")
                return None
            data.check(run)
            refresh_weights(model)  # the codes of the first forward pass
            if world.is_main:
                with writing(run):
                    write_run_record(config, run, report, world)
                    data.write(run)
                print(report)
            with _open_metrics(config, world, start, data) as metrics:
                facts = {
                    "data": data.fingerprint,
                    "data_offset": start.data_offset,
                    "global_batch": settings.global_batch,
                    "steps": settings.steps,
                    "architecture": architecture.to_hf(),
                    "tokenizer": str(tokenizer.resolve()) if tokenizer else None,
                    "config": config.model_dump(mode="json"),
                }
                saver = _Saver(store, model, optimizer, metrics, facts)
                stopped = _train(config, world, data, architecture, saver, start, bool(report.converted))
            if world.is_main and stopped is None:
                print(_closing_line(run, settings.steps, metrics.newest))
            return stopped


def _train(
    config: TrainingConfig,
    world: World,
    data: StageData,
    architecture: ModelConfig,
    saver: "_Saver",
    start: "_Start",
    has_fp8: bool,
) -> signal.Signals | None:
    """The loop, from where ``start`` stands to the last step or a signal."""
    settings, model, metrics = data.loop, saver.model, saver.metrics
    held_out = data.held_out() if settings.eval_every else []
    graphs = Graphs(model) if settings.cuda_graphs and can_record(world) else None
    callbacks = Callbacks(
        batches=lambda first, last, interrupted: data.batches(first, last, start.data_offset, interrupted),
        learning_rate=lambda step: learning_rate(step, settings.steps, config.optim),
        evaluate=data.evaluate
        or (lambda _: {"eval_loss": evaluate(model, held_out, world, data.attention_for, graphs)}),
        save=saver.save,
        poll=saver.poll,
        finish=saver.finish,
        attention_for=data.attention_for,
        objective=cross_entropy_of_fp8_head if config.fp8.head else data.objective,
        step_values=data.step_values,
        together=data.together,
    )
    data.begin(model, start.progress, metrics)
    return train(
        model,
        saver.optimizer,
        start.progress,
        settings,
        world,
        metrics,
        callbacks,
        clip=config.optim.clip,
        flops_per_token=lambda span: architecture.flops_per_token(0, span),
        log=config.log,
        health_every=config.fp8.health_every if has_fp8 else 0,
        trace_folder=Path(config.run) / "profile",
        graphs=graphs,
    )


def _closing_line(run: Path, steps: int, values: Mapping[str, float]) -> str:
    """How a run ended, and where to look at it."""
    names = {"reward": "reward", "eval_reward": "held-out reward", "loss": "loss", "eval_loss": "held-out loss"}
    shown = [f"{name} {values[key]:.4f}" for key, name in names.items() if key in values]
    return f"{', '.join([f'done: {steps} steps', *shown])}; infir2 report {run} shows it"


def _open_metrics(config: TrainingConfig, world: World, start: "_Start", data: StageData) -> MetricsWriter:
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


@dataclass(frozen=True)
class _Saver:
    """Saves everything a resume needs, and tells the metrics of each checkpoint once it is on disk."""

    store: CheckpointStore
    model: CausalLM
    optimizer: torch.optim.Optimizer
    metrics: MetricsWriter
    facts: dict[str, Any]
    """What meta.json holds beside the progress: the same over the whole run."""

    def save(self, at: TrainState) -> None:
        tensors = {"model": model_state(self.model), "optim": optimizer_state(self.model, self.optimizer)}
        self.store.save(at.step, tensors, {"progress": at.to_json(), **self.facts})

    def poll(self) -> None:
        self._tell(self.store.poll())

    def finish(self) -> None:
        self._tell(self.store.wait())

    def _tell(self, saved: Sequence[int]) -> None:
        for step in saved:
            self.metrics.event(step, "checkpoint", path=str(self.store.folder(step)))


@dataclass(frozen=True)
class _Start:
    """Where training starts from."""

    progress: TrainState
    data_offset: int
    events: list[tuple[str, dict[str, Any]]]


def _restore(
    config: TrainingConfig, store: CheckpointStore, state: dict[str, Any], architecture: ModelConfig, data: StageData
) -> _Start:
    """Load the run's own newest checkpoint, else the one of [init], else start from the first weights."""
    newest = store.latest()
    events: list[tuple[str, dict[str, Any]]] = [("damaged_checkpoint", {"problem": p}) for p in store.problems]
    if newest is not None:
        meta = read_meta(newest)  # the tensors are loaded when nothing speaks against it
        _check_architecture(newest, meta, architecture, "Restore it, or give another run folder with --run")
        if meta["data"]["sha256"] != data.fingerprint["sha256"]:
            raise CheckpointError(
                f"{newest}: was made with other data or another order ({data.order_keys} changed); "
                "restore them, or start a new run with init.checkpoint"
            )
        if meta["global_batch"] != config.train.global_batch:
            raise CheckpointError(
                f"{newest}: was made with train.global_batch = {meta['global_batch']}, the recipe says "
                f"{config.train.global_batch}; restore it, or start a new run with init.checkpoint"
            )
        changes = changes_on_resume(config, data.loop.steps, meta, newest)
        store.load(newest, state, cast=("optim",))  # moments: optim.moments may have changed
        events.append(("resume", {"from": str(newest)}))
        events += [("recipe_changed", {"change": change}) for change in changes]
        return _Start(TrainState(**meta["progress"]), meta["data_offset"], events)
    if config.init.checkpoint is None:
        return _Start(TrainState(), 0, events)
    source = store.find(config.init.checkpoint)
    wanted = state if config.init.keep_optimizer else {"model": state["model"]}
    _check_architecture(source, read_meta(source), architecture, "Name another, or leave out the model section")
    meta = store.load(source, wanted, ignore=() if config.init.keep_optimizer else ("optim",), cast=("optim",))
    same_data = data.continues and meta["data"]["sha256"] == data.fingerprint["sha256"]
    seen = meta["data_offset"] + meta["progress"]["step"] * meta["global_batch"]
    events.append(("init", {"from": str(source), "data": "continued" if same_data else "from its beginning"}))
    return _Start(TrainState(), seen if same_data else 0, events)


def _check_architecture(path: Path, meta: Mapping[str, Any], architecture: ModelConfig, cure: str) -> None:
    """Raise CheckpointError, naming the fields, where a checkpoint holds another model than the recipe's."""
    trained = from_hf(meta["architecture"], f"{path}/meta.json")
    ours, theirs = dataclasses.asdict(architecture), dataclasses.asdict(trained)
    differ = [f"{key} {theirs[key]} (the recipe's: {ours[key]})" for key in ours if ours[key] != theirs[key]]
    if differ := [line for line in differ if not line.startswith("initializer_range ")]:
        more = f" and {len(differ) - 4} more" if len(differ) > 4 else ""
        raise CheckpointError(
            f"{path}: holds another model than the recipe's model section describes: {', '.join(differ[:4])}{more}. "
            f"{cure}"
        )


def seed_everything(config: TrainingConfig) -> None:
    """Seed torch, and ask for deterministic kernels where the recipe does."""
    torch.manual_seed(config.train.seed)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
