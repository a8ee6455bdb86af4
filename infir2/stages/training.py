"""What every training stage wires alike: model, FP8 conversion, sharding, optimiser, checkpoints, resume, the loop."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from infir2.checkpoint.huggingface import load_into, read_config
from infir2.checkpoint.state import model_state, optimizer_state
from infir2.checkpoint.store import CheckpointStore, peek_meta
from infir2.config import TrainingConfig, TrainSection
from infir2.errors import CheckpointError
from infir2.fp8.convert import SwapReport, convert, keep_outer_layers, refresh_weights
from infir2.fp8.recipe import recipe_named
from infir2.model.config import ModelConfig, from_hf
from infir2.model.presets import preset
from infir2.model.transformer import CausalLM
from infir2.parallel.apply import fill, parallelize
from infir2.parallel.runtime import World
from infir2.stages.run_folder import describe, locked
from infir2.train.loop import Callbacks, Progress, train
from infir2.train.metrics import MetricsWriter
from infir2.train.optimizer import build_optimizer
from infir2.train.schedule import learning_rate
from infir2.train.step import AttentionFor, evaluate
from infir2.types import Batch


@dataclass(frozen=True)
class StageData:
    """What a stage's data give to the loop."""

    loop: TrainSection
    """The recipe's train section, with its number of steps."""
    batches: Callable[[int, int, int], Iterator[Sequence[Batch]]]
    """(first step, last step, samples used before step 1) -> this rank's micro-batches, steps from 1, last included."""
    held_out: Callable[[], Sequence[Batch]]
    """This rank's held-out batches; the same number on every rank."""
    attention_for: AttentionFor
    fingerprint: dict[str, Any]
    """Decides, by its key ``sha256``, whether a checkpoint was made with the same data in the same order."""
    attention_span: float | None = None
    """Mean number of positions a token attends to, for the count of FLOPs; None for whole causal sequences."""
    sequence_length: int = 0
    """Tokens per sequence; needed where there is no attention_span."""
    order_keys: str = "sources, weights, seq_len or seed"
    """What in the recipe decides the fingerprint, for the message about one that changed."""
    continues: bool = True
    """Whether a run that starts from another run's checkpoint goes on where that one was in the same data."""
    step_values: Callable[[int], Mapping[str, float]] = lambda step: {}
    """Step -> more numbers for its line of metrics (see Callbacks)."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """What the data hold, for an event in the metrics; empty = no event."""
    write: Callable[[Path], None] = lambda run: None
    """Writes what the stage keeps in its run folder."""


def starting_meta(config: TrainingConfig) -> dict[str, Any] | None:
    """meta.json of the checkpoint that training starts from: the run's own newest, else that of [init], else None."""
    found = peek_meta(Path(config.run) / "checkpoints")
    return found or (peek_meta(config.init.checkpoint) if config.init.checkpoint else None)


def model_config(config: TrainingConfig, vocab_size: int) -> ModelConfig:
    """The architecture of a recipe; ``vocab_size`` is the tokenizer's, for presets that do not give their own.

    Where the model section names none, it is the architecture of the checkpoint that training starts from.
    """
    section = config.model
    if not section.is_named:
        meta = starting_meta(config)
        if meta is None:
            raise CheckpointError(f"{config.init.checkpoint}: no checkpoint to start from")
        return from_hf(meta["architecture"], f"{config.init.checkpoint}: meta.json")
    if section.path is not None:
        return from_hf(read_config(section.path), f"{section.path}/config.json")
    rows = section.vocab_size or -(-vocab_size // 128) * 128
    return dataclasses.replace(preset(section.preset or "", rows), initializer_range=section.init_std)


def build_model(config: TrainingConfig, architecture: ModelConfig, world: World) -> tuple[CausalLM, SwapReport]:
    """The model of a recipe on this rank's device, converted, sharded and with its first weights.

    Where the model section names none the weights are still to be loaded from a checkpoint.
    """
    dtype = getattr(torch, config.model.dtype)
    with torch.device("meta"):
        model = CausalLM(architecture, dtype)
    names = [name for name, _ in model.named_parameters()]
    fp8 = config.fp8
    keep = keep_outer_layers(architecture.num_hidden_layers, fp8.bf16_first_layers, fp8.bf16_last_layers)
    report = convert(model, recipe_named(fp8.recipe, fp8.scale_format), keep)
    parallelize(
        model,
        model.model.layers,
        world,
        gather_dtype=getattr(torch, config.parallel.gather_dtype),
        activation_checkpointing=config.train.activation_checkpointing == "full",
        compile_layers=config.train.compile,
        reshard_after_forward=config.parallel.reshard_after_forward,
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
) -> bool:
    """Train one stage to its end, resuming where its run folder says. Returns False where a signal ended it early."""
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
            refresh_weights(model)  # the codes of the first forward pass
            if world.is_main:
                describe(config, run, report, world)
                print(report)
                data.write(run)
            with _open_metrics(config, world, start, data) as metrics:
                if start.progress.step >= settings.steps:
                    return True
                facts = {
                    "data": data.fingerprint,
                    "data_offset": start.data_offset,
                    "global_batch": settings.global_batch,
                    "architecture": architecture.to_hf(),
                    "tokenizer": str(tokenizer.resolve()) if tokenizer else None,
                    "config": config.model_dump(mode="json"),
                }
                held_out = data.held_out() if settings.eval_every else []
                callbacks = Callbacks(
                    batches=lambda first, last: data.batches(first, last, start.data_offset),
                    learning_rate=lambda step: learning_rate(step, settings.steps, config.optim),
                    evaluate=lambda: evaluate(model, held_out, world, data.attention_for),
                    save=_saver(store, model, optimizer, metrics, facts),
                    poll=store.poll,
                    finish=store.wait,
                    attention_for=data.attention_for,
                    step_values=data.step_values,
                )
                return train(
                    model,
                    optimizer,
                    start.progress,
                    settings,
                    world,
                    metrics,
                    callbacks,
                    clip=config.optim.clip,
                    flops_per_token=architecture.flops_per_token(data.sequence_length, data.attention_span),
                    log=config.log,
                    health_every=config.fp8.health_every if report.converted else 0,
                    trace_folder=run / "profile",
                )


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


def _saver(
    store: CheckpointStore,
    model: CausalLM,
    optimizer: torch.optim.Optimizer,
    metrics: MetricsWriter,
    facts: dict[str, Any],
) -> Callable[[Progress], None]:
    """Saves everything a resume needs; ``facts`` is what stays the same over the run."""

    def save(at: Progress) -> None:
        tensors = {"model": model_state(model), "optim": optimizer_state(model, optimizer)}
        store.save(at.step, tensors, {"progress": at.to_json(), **facts})
        metrics.event(at.step, "checkpoint", path=str(store.root / f"step-{at.step:06d}"))

    return save


@dataclass(frozen=True)
class _Start:
    """Where training starts from."""

    progress: Progress
    data_offset: int
    events: list[tuple[str, dict[str, Any]]]


def _restore(
    config: TrainingConfig, store: CheckpointStore, state: dict[str, Any], architecture: ModelConfig, data: StageData
) -> _Start:
    """Load the run's own newest checkpoint, else the one of [init], else start from the first weights."""
    newest = store.latest()
    events: list[tuple[str, dict[str, Any]]] = [("damaged_checkpoint", {"problem": p}) for p in store.problems]
    if newest is not None:
        meta = _load(store, newest, state, architecture)
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
        events.append(("resume", {"from": str(newest)}))
        return _Start(Progress(**meta["progress"]), meta["data_offset"], events)
    if config.init.checkpoint is None:
        return _Start(Progress(), 0, events)
    source = store.find(config.init.checkpoint)
    wanted = state if config.init.keep_optimizer else {"model": state["model"]}
    meta = _load(store, source, wanted, architecture, ignore=() if config.init.keep_optimizer else ("optim",))
    same_data = data.continues and meta["data"]["sha256"] == data.fingerprint["sha256"]
    seen = meta["data_offset"] + meta["progress"]["step"] * meta["global_batch"]
    events.append(("init", {"from": str(source), "data": "continued" if same_data else "from its beginning"}))
    return _Start(Progress(), seen if same_data else 0, events)


def _load(
    store: CheckpointStore, path: Path, state: dict[str, Any], architecture: ModelConfig, ignore: Sequence[str] = ()
) -> dict[str, Any]:
    meta = store.load(path, state, ignore)
    trained = from_hf(meta["architecture"], f"{path}/meta.json")
    if trained != dataclasses.replace(architecture, initializer_range=trained.initializer_range):
        raise CheckpointError(f"{path}: holds another architecture than the recipe's model section describes")
    return meta


def seed_everything(config: TrainingConfig) -> None:
    """Seed torch, and ask for deterministic kernels where the recipe does."""
    torch.manual_seed(config.train.seed)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
