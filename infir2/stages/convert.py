"""Convert a model: run or checkpoint, Hugging Face folder, FP8 Hugging Face folder, each into each.

SOURCE is a run folder (its newest intact checkpoint is taken), a checkpoint folder, or a Hugging Face folder with
plain or FP8 weights. --to hf writes bfloat16 safetensors, --to fp8 E4M3 codes with 128 x 128 block scales, --to dcp a
folder that init.checkpoint accepts with init.keep_optimizer = false.

    infir2 convert runs/sft models/mine                                    # for any program that reads Hugging Face
    infir2 convert runs/sft models/mine-fp8 --to fp8 --scale-dtype e8m0    # half the size, the trainer's own codes
"""

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from infir2.errors import CheckpointError, ConfigError
from infir2.launch.progress import bytes_bar

if TYPE_CHECKING:
    from infir2.checkpoint.convert import Written
    from infir2.checkpoint.export_fp8 import Fp8Export
    from infir2.checkpoint.model_source import ModelSource

Format = Literal["hf", "fp8", "dcp"]


@dataclass(frozen=True)
class Options:
    """How to convert; the command line has the same names. None means the default that ``add_arguments`` tells."""

    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    scale_format: Literal["ue8m0", "fp32"] | None = None
    scale_dtype: Literal["fp32", "e8m0"] | None = None
    tokenizer: Path | None = None
    max_shard_gb: float = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="run, checkpoint or Hugging Face folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make; must not exist or be empty")
    parser.add_argument("--to", choices=["hf", "fp8", "dcp"], default="hf", help="format to write (default: hf)")
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="with --to hf (default: bfloat16; what is stored where the source is a plain Hugging Face folder)",
    )
    parser.add_argument(
        "--scale-format",
        choices=["ue8m0", "fp32"],
        help="with --to fp8: powers of two, or amax / 448 (default: as the run trained, ue8m0 for other sources)",
    )
    parser.add_argument(
        "--scale-dtype",
        choices=["fp32", "e8m0"],
        help="with --to fp8: dtype that scales are stored in; e8m0 holds powers of two only (default: fp32)",
    )
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder (default: the one that goes with SOURCE)")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="largest safetensors file (default: 5)")


def run(args: argparse.Namespace) -> int:
    options = Options(args.dtype, args.scale_format, args.scale_dtype, args.tokenizer, args.max_shard_gb)
    convert_model(args.source, args.out, args.to, options, Console(highlight=False, soft_wrap=True))
    return 0


def convert_model(
    source: str, out: Path, to: Format = "hf", options: Options | None = None, console: Console | None = None
) -> "Written":
    """Convert ``source`` into the new folder ``out``; see ``add_arguments``.

    Raises CheckpointError for a source that is not whole, an ``out`` that is not empty, a full disk, and ConfigError
    for options that do not belong together. ``out`` is then as it was.
    """
    import dataclasses

    import torch

    from infir2.checkpoint.huggingface import require_new
    from infir2.checkpoint.model_source import open_model_source
    from infir2.launch.end_tokens import with_end_tokens

    options, console, started = options or Options(), console or Console(quiet=True), time.monotonic()
    _check(options, to)
    require_new(out)  # Before a source of many GB is verified.
    wide = to == "dcp" or options.dtype == "float32"
    model = open_model_source(source, torch.float32 if wide else torch.bfloat16)
    if options.tokenizer is not None:
        model = dataclasses.replace(model, tokenizer=options.tokenizer)
    model = with_end_tokens(model)
    parameters, read = model.architecture.num_parameters(), model.tensors.nbytes
    console.print(f"{model.path}: {_KINDS[model.kind]}, {model.architecture.model_type}, {parameters:,} parameters")
    if model.tokenizer is None:
        console.print(f"note: {model.path} has no tokenizer, so {out} gets none; --tokenizer names one", soft_wrap=True)
    written = _convert(model, out, to, options, console)
    seconds = time.monotonic() - started
    console.print(
        f"{out}: {written.tensors} tensors, {written.nbytes:,} bytes written from {read:,} in {seconds:.1f} s "
        f"({(read + written.nbytes) / seconds / 1e9:.2f} GB/s read and written)"
    )
    return written


_KINDS = {"hf": "Hugging Face folder", "fp8": "FP8 Hugging Face folder", "dcp": "training checkpoint"}


def _check(options: Options, to: Format) -> None:
    for name, belongs in (("dtype", "hf"), ("scale_format", "fp8"), ("scale_dtype", "fp8")):
        if getattr(options, name) is not None and to != belongs:
            raise ConfigError(f"--{name.replace('_', '-')}: only with --to {belongs}")
    if not 0 < options.max_shard_gb < math.inf:
        raise ConfigError(f"--max-shard-gb {options.max_shard_gb}: must be a number above 0")


def _convert(model: "ModelSource", out: Path, to: Format, options: Options, console: Console) -> "Written":
    import torch

    from infir2.checkpoint.convert import to_checkpoint, to_fp8, to_hf
    from infir2.launch.model_card import model_card

    limit = int(options.max_shard_gb * 1e9)
    export = plan(model, options) if to == "fp8" else None
    if export is not None:
        for line in _export_lines(export):
            console.print(line)
    with bytes_bar(console, "converting") as report:
        if to == "dcp":
            return to_checkpoint(model, out, _starting_facts(model), report)
        if export is not None:
            return to_fp8(model, out, export, model_card(model, export), report, limit)
        dtype = getattr(torch, options.dtype) if options.dtype else None
        return to_hf(model, out, dtype, model_card(model, None), report, limit)


def plan(model: "ModelSource", options: Options) -> "Fp8Export":
    """What is quantised. The layers and the scale format of a run that trained in FP8 are kept."""
    from infir2.checkpoint.export_fp8 import plan_export

    if model.kind == "fp8":
        raise CheckpointError(
            f"{model.path}: is already an FP8 folder; to quantise it anew, convert it with --to hf first"
        )
    recipe, scale_format, keep = model.trained_fp8()
    if recipe == "bf16":  # it had no scales, and every layer can be quantised
        scale_format, keep = "ue8m0", {}
    export = plan_export(model.architecture, options.scale_format or scale_format, options.scale_dtype or "fp32", keep)
    if not export.converted:
        name, why = next(iter(export.skipped.items()))
        raise CheckpointError(f"{model.path}: none of its layers can be stored in FP8 ({name}: {why}); take --to hf")
    return export


def _export_lines(export: "Fp8Export") -> Iterator[str]:
    total = len(export.converted) + len(export.skipped)
    yield f"{len(export.converted)} of {total} linear layers in FP8, scales {export.scale_format}"
    reasons: dict[str, list[str]] = {}
    for name, reason in export.skipped.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        yield f"  bfloat16: {', '.join(names[:2])}{more}: {reason}"


def _starting_facts(model: "ModelSource") -> dict[str, Any]:
    """What a run that starts from this checkpoint reads of it."""
    from infir2.launch.environment import environment
    from infir2.train.loop import TrainState

    return {
        "progress": TrainState().to_json(),
        "data": {"sha256": None},
        "data_offset": 0,
        "global_batch": 0,
        "converted": {"from": str(model.path), **environment()},
    }
