"""The model of a recipe: its architecture, FP8 layers, sharding, and the weights that training starts from."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from infir2.checkpoint.folders import peek_meta
from infir2.checkpoint.huggingface import load_into, read_config
from infir2.checkpoint.state import model_state
from infir2.checkpoint.store import CheckpointStore
from infir2.config import Fp8Section, TrainingConfig
from infir2.data.tokenizer import has_tokenizer
from infir2.errors import CheckpointError, ConfigError
from infir2.fp8.convert import SwapReport, convert, keep_outer_layers, refresh_stale, refresh_weights
from infir2.fp8.recipe import recipe_named
from infir2.kernels.matmul import unsupported_reason
from infir2.model.config import ModelConfig, from_hf
from infir2.model.presets import preset
from infir2.model.transformer import CausalLM
from infir2.parallel.apply import fill, parallelize
from infir2.parallel.device import too_little_memory
from infir2.parallel.runtime import World


def starting_meta(config: TrainingConfig) -> dict[str, Any] | None:
    """meta.json of the checkpoint that training starts from: the run's own newest, else that of [init], else None.

    Raises CheckpointError where init.checkpoint is needed and names none, or none with what is to be kept of it, and
    for a run folder that no training has made.
    """
    found, named = peek_meta(Path(config.run) / "checkpoints"), config.init.checkpoint
    if found is not None and "converted" in found:
        raise CheckpointError(
            f"{config.run}: was made by `infir2 convert --to dcp`, for runs to start from; give another --run, with "
            f"--init.checkpoint {config.run} --init.keep_optimizer false"
        )
    if found is not None or named is None:
        return found
    found = peek_meta(named)
    if found is None:
        raise _no_start(named)
    if config.init.keep_optimizer and "converted" in found:
        raise CheckpointError(
            f"{named}: has no optimiser state to keep: it was made by `infir2 convert`; set init.keep_optimizer = false"
        )
    return found


def starting_tokenizer(config: TrainingConfig) -> Path | None:
    """Folder of the tokenizer that the weights which training starts from know; None for random or unknown ones."""
    meta = starting_meta(config)
    name = meta.get("tokenizer") if meta else config.model.path
    return Path(name) if name and has_tokenizer(Path(name)) else None


def model_folder(path: str) -> Path:
    """What model.path names. Raises CheckpointError where that is a run or a checkpoint."""
    folder = Path(path)
    if os.path.isdir(folder) and not (folder / "config.json").exists() and peek_meta(folder) is not None:
        raise CheckpointError(
            f"model.path: {path}: holds a training checkpoint, which init.checkpoint takes; model.path takes a Hugging "
            f"Face folder: infir2 convert {path} OUT"
        )
    return folder


def _no_start(named: str) -> CheckpointError:
    """That init.checkpoint names nothing to start from."""
    path = Path(named).expanduser()
    why = "" if path.is_dir() else ": there is no such folder"
    if (path / "config.json").exists():
        why = ": it looks like a Hugging Face folder, which model.path takes"
    return CheckpointError(f"{named}: no checkpoint to start from{why}")


def model_config(config: TrainingConfig, vocab_size: int) -> ModelConfig:
    """The architecture of a recipe; ``vocab_size`` is the tokenizer's, for presets that do not give their own.

    Where the model section names none, it is the architecture of the checkpoint that training starts from.
    """
    section = config.model
    if not section.is_named and (meta := starting_meta(config)):
        return from_hf(meta["architecture"], f"{config.init.checkpoint}: meta.json")
    if section.path is not None:
        return from_hf(read_config(model_folder(section.path)), f"{section.path}/config.json")
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
    _allocate(model, world.device)
    if config.model.path is not None:
        load_into(model, config.model.path)
    elif config.model.preset is not None:
        parameters = dict(zip(names, model.parameters(), strict=True))
        for name, value in model.initial_values(config.train.seed):
            fill(parameters[name], value)
    return model, report


def _allocate(model: CausalLM, device: torch.device) -> None:
    """Give a model on the meta device its memory. Raises ConfigError where there is not enough."""
    try:
        model.to_empty(device=device)
    except RuntimeError as error:
        if too_little_memory(error) is None:
            raise
        raise ConfigError(
            f"the model's {model.config.num_parameters():,} parameters do not fit into the memory of this device "
            f"({device}); --dry-run tells how much training needs"
        ) from None


def start_model(
    config: TrainingConfig, architecture: ModelConfig, world: World, path: str | None = None
) -> tuple[CausalLM, str | None]:
    """The model that training starts from, frozen, and the folder that its weights lie in: ``path``, else the one that
    the recipe means now."""
    if config.init.checkpoint is None and config.model.path is not None:
        path = path or str(Path(config.model.path).resolve())
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": path})})
    model, _ = build_model(config, architecture, world)
    if config.init.checkpoint is not None:
        store = CheckpointStore(Path(config.run) / "checkpoints")
        source = store.find(path or config.init.checkpoint)
        store.load(source, {"model": model_state(model)}, ("optim",))
        path = str(source.resolve())
    refresh_weights(model)
    return model.requires_grad_(False), path
