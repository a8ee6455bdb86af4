"""From a model that a user names to an engine that runs it, in the precision that it was trained or is stored in."""

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from infir2.errors import ConfigError, DataError
from infir2.launch.progress import bytes_bar

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from infir2.checkpoint.model_source import ModelSource
    from infir2.fp8.convert import SwapReport
    from infir2.model.transformer import CausalLM
    from infir2.rollout.engine import Engine

PRECISIONS = ("auto", "bf16", "blockwise")
DTYPES = ("auto", "bfloat16", "float32")
CPU_CACHE_TOKENS = 65_536
_CACHE_SHARE = 0.85  # of the GPU memory that the weights leave; the rest is for activations


@dataclass(frozen=True)
class InferenceOptions:
    """How a model is run; the command line has the same names."""

    precision: str = "auto"
    dtype: str = "auto"
    tokenizer: Path | None = None
    cache_tokens: int | None = None
    max_sequences: int = 256
    max_batch_tokens: int = 4096
    max_length: int | None = None
    cache_dtype: str = "auto"
    seed: int = 0

    @staticmethod
    def of(args: argparse.Namespace) -> "InferenceOptions":
        return InferenceOptions(**{name: getattr(args, name) for name in InferenceOptions.__dataclass_fields__})


def add_inference_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of everything that generates."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--precision", choices=PRECISIONS, default="auto",
        help="linear layers: auto (default) = as the run trained or the folder stores them, bf16, or blockwise = FP8"
    )  # fmt: skip
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of everything else (default: auto = as trained, else bfloat16)"
    )
    group.add_argument("--tokenizer", type=Path, help="tokenizer folder (default: the one that goes with MODEL)")
    group.add_argument(
        "--cache-tokens", type=int, metavar="N",
        help=f"tokens in the key-value cache (default: what fits into GPU memory; {CPU_CACHE_TOKENS:,} on a CPU)"
    )  # fmt: skip
    group.add_argument(
        "--cache-dtype", choices=("auto", "fp8"), default="auto", help="of the key-value cache (default: auto)"
    )
    group.add_argument("--max-sequences", type=int, default=256, metavar="N", help="samples at once")
    group.add_argument("--max-batch-tokens", type=int, default=4096, metavar="N", help="tokens of a forward pass")
    group.add_argument(
        "--max-length", type=int, metavar="N", help="longest prompt plus answer (default: the model's positions)"
    )
    group.add_argument("--seed", type=int, default=0, help="of sampling, where a request brings none")


def load_engine(
    text: str, options: InferenceOptions, console: Console
) -> tuple["Engine", "PreTrainedTokenizerBase", "ModelSource"]:
    """The engine around the model that ``text`` names, its tokenizer, and where both come from.

    Raises CheckpointError for a model that is not whole, DataError for one without a tokenizer, ConfigError for
    options that do not go together, and UserError where the device has too little memory.
    """
    from infir2.data.tokenizer import load_tokenizer
    from infir2.parallel.device import default_device, enough_memory
    from infir2.rollout.engine import Engine
    from infir2.rollout.options import EngineOptions

    source = _open(text)
    tokenizer = load_tokenizer(_tokenizer_place(text, source, options))
    device = default_device()
    with enough_memory(f"{text}: the model", "take a smaller one, or a larger device"):
        model, report = load_model(source, options, device, console)
    if report.converted:
        console.print(str(report))
    tokens = options.cache_tokens
    engine_options = EngineOptions(
        cache_tokens=_default_cache_tokens(model, options, device) if tokens is None else tokens,
        max_sequences=options.max_sequences,
        max_batch_tokens=max(options.max_batch_tokens, options.max_sequences),
        max_length=options.max_length,
        cache_dtype=options.cache_dtype,  # type: ignore[arg-type]
        seed=options.seed,
    )
    with enough_memory("the engine", engine_options.smaller()):
        return Engine(model, tokenizer, engine_options), tokenizer, source


@dataclass(frozen=True)
class CheckedModel:
    """A model that can be loaded and asked, as far as that shows without its weights."""

    weights: str
    """Changes when weights, tokenizer or configuration do."""
    longest: int
    """Tokens of prompt and response together."""


def check_chat_model(text: str, options: InferenceOptions) -> CheckedModel:
    """Raises what ``load_engine`` would, and DataError for a tokenizer that no chat can be written with."""
    from infir2.data.chat import ChatTokenizer, choose_template
    from infir2.data.tokenizer import load_tokenizer

    source = _open(text)
    place = _tokenizer_place(text, source, options)
    tokenizer = load_tokenizer(place)
    try:
        ChatTokenizer(tokenizer, choose_template(tokenizer, "auto"))
    except DataError as error:
        raise DataError(f"{text}: {error}") from None
    limits = (source.architecture.max_position_embeddings, options.max_length, options.cache_tokens)
    return CheckedModel(_identity(source.path, place), min(limit for limit in limits if limit is not None))


def _identity(model: Path, tokenizer: Path) -> str:
    """Weights by names, sizes and times, the small files beside them by what they hold."""
    digest = hashlib.sha256()
    for file in sorted(file for ending in ("*.safetensors", "*.distcp") for file in model.rglob(ending)):
        stat = file.stat()
        digest.update(json.dumps([file.name, stat.st_size, stat.st_mtime_ns]).encode())
    endings = ("*.json", "*.jinja", "*.model", "*.txt")
    for file in (file for folder in (model, tokenizer) for ending in endings for file in sorted(folder.glob(ending))):
        digest.update(json.dumps([file.name, hashlib.sha256(file.read_bytes()).hexdigest()]).encode())
    return digest.hexdigest()


def _tokenizer_place(text: str, source: "ModelSource", options: InferenceOptions) -> Path:
    place = options.tokenizer or source.tokenizer
    if place is None:
        raise DataError(f"{text}: no tokenizer goes with this model; give one with --tokenizer FOLDER")
    return place


def load_model(
    source: "ModelSource", options: InferenceOptions, device: "torch.device", console: Console
) -> tuple["CausalLM", "SwapReport"]:
    """The model with its weights, FP8 layers converted and quantised; parameters that need no float32 have none."""
    import torch

    from infir2.fp8.convert import convert, refresh_weights
    from infir2.fp8.recipe import recipe_named
    from infir2.model.transformer import CausalLM

    dtype = _compute_dtype(source, options)
    name, scale_format, keep = fp8_of(source, options.precision)
    with torch.device("meta"):
        model = CausalLM(source.architecture, dtype)
    # Without a trainer no master weights are needed: layers round their weights to the compute dtype before they use
    # them, FP8 layers to bfloat16.
    model.to(dtype)
    report = convert(model, recipe_named(name, scale_format), keep)
    model.to_empty(device=device)
    parameters = dict(model.named_parameters())
    total = sum(parameter.nbytes for parameter in parameters.values())
    done = 0
    with bytes_bar(console, "loading") as progress, torch.no_grad():
        for parameter_name, stored in source.names.items():
            target = parameters[parameter_name]
            target.copy_(source.tensors.tensor(stored))
            done += target.nbytes
            progress(done, total)
    refresh_weights(model)
    model.eval().requires_grad_(False)
    return model, report


def fp8_of(source: "ModelSource", precision: str) -> tuple[str, str, dict[str, str]]:
    """(recipe, scale format, layers to keep -> why): of training, of the FP8 folder, or what ``precision`` asks for."""
    from infir2.checkpoint.huggingface import read_config

    recipe, scale_format, keep = source.trained_fp8()
    if source.kind == "fp8":
        stored: dict[str, Any] = read_config(source.path)["quantization_config"]
        recipe = "blockwise"
        scale_format = "ue8m0" if stored.get("scale_fmt") == "ue8m0" else "fp32"
        skipped = stored.get("modules_to_not_convert") or []
        keep = {f"{name}.": "the folder stores it in high precision" for name in skipped}
    return (recipe if precision == "auto" else precision), scale_format, keep


def model_name(text: str) -> str:
    """What a model is called where no name is given: its folder's name, a step's with its run's."""
    path = Path(text).expanduser().resolve()
    return f"{path.parents[1].name}-{path.name}" if path.parent.name == "checkpoints" else path.name


def _open(text: str) -> "ModelSource":
    import torch

    from infir2.checkpoint.model_source import open_model_source

    # Scales that are not powers of two make values that bfloat16 would round; float32 holds all of them.
    return open_model_source(text, torch.float32)


def _compute_dtype(source: "ModelSource", options: InferenceOptions) -> "torch.dtype":
    import torch

    if options.dtype != "auto":
        return getattr(torch, options.dtype)
    trained = ((source.meta.get("config") or {}).get("model") or {}).get("dtype", "bfloat16")
    return getattr(torch, trained)


def _default_cache_tokens(model: "CausalLM", options: InferenceOptions, device: "torch.device") -> int:
    import torch

    from infir2.rollout.cache_size import bytes_per_token, stored_dtype

    if device.type != "cuda":
        return CPU_CACHE_TOKENS
    free, _ = torch.cuda.mem_get_info(device)
    config, dtype = model.config, stored_dtype(options.cache_dtype, model.model.compute_dtype)
    token = bytes_per_token(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, dtype)
    tokens = int(free * _CACHE_SHARE / token)
    if tokens < 1024:
        raise ConfigError(f"the weights leave room for a cache of {tokens} tokens only; this GPU is too small for them")
    return tokens
