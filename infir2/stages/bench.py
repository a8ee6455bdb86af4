"""Measure FP8 against BF16 side by side, in one process: `infir2 bench {step,decode,gemm,quantize,attention}`.

step       forward, forward + backward and optimiser of a whole model with random weights, in each precision
decode     the rollout engine: prompts read and tokens made a second
gemm       forward and weight-gradient GEMMs of every linear shape of a model, in TFLOP/s
quantize   the quantiser's kernels: bytes read and written over time
attention  whole rows and packed documents, by flash-attn-4 (if installed) and by torch alone

Figures are medians. --json writes them with command, commit, device and versions. Without a GPU, FP8 is emulated and
figures tell about this machine alone: the small presets and short sequences are measured.
"""

import argparse
import itertools
import json
import sys
import textwrap
from pathlib import Path
from typing import Any, Literal

from infir2.durable import check_output, write_output
from infir2.errors import ConfigError, did_you_mean

PEERS = ("hf", "torchao:tensorwise", "torchao:rowwise", "torchao:rowwise_with_gw_hp")
PRECISIONS = ("bf16", "blockwise", "hybrid", "rowwise", "tensorwise")
# Of arguments that are not given: on a GPU, and without one.
DEFAULTS = {"model": ("qwen2.5-1.5b", "tiny"), "length": (8192, 512), "new": (1024, 64), "repeats": (10, 3)}
WITHOUT_GPU = ("micro", "tiny", "small-150m")
"""Presets that a CPU gets through."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", choices=["step", "decode", "gemm", "quantize", "attention"], help="what is measured, see above"
    )
    parser.add_argument("--model", help=f"preset whose shapes are used (default: {_default('model')})")
    parser.add_argument("--batch", type=int, default=2, help="sequences")
    parser.add_argument(
        "--length", type=int, help=f"tokens of a sequence; decode: of a prompt (default: {_default('length')})"
    )
    parser.add_argument("--new", type=int, help=f"decode: tokens made after the prompt (default: {_default('new')})")
    parser.add_argument("--cache", choices=["auto", "fp8"], default="auto", help="decode: dtype of keys and values")
    parser.add_argument("--layers", type=int, default=0, help="decoder layers (default: the model's)")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=[
            *PRECISIONS,
            *(f"{name}/{kept}" for name in PRECISIONS[1:3] for kept in ("bf16", "recompute", "head")),
        ],
        default=["bf16", "blockwise", "hybrid"],
        metavar="NAME",
        help=f"{', '.join(PRECISIONS)}; blockwise/bf16, hybrid/recompute: how gate and up are kept; /head: with an "
        "FP8 output head (default: bf16 blockwise hybrid)",
    )
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS, default=[], metavar="NAME",
        help=f"step: other implementations to measure: {', '.join(PEERS)}"
    )  # fmt: skip
    parser.add_argument("--optimizer", action="store_true", help="step: AdamW as well")
    parser.add_argument(
        "--checkpointing", choices=["none", "attention", "full"], default="none", help="step: activation checkpointing"
    )
    parser.add_argument("--layers-only", action="store_true", help="step: decoder layers without the output head")
    parser.add_argument(
        "--moments", choices=["float32", "bfloat16"], default="float32", help="step: how AdamW keeps its moments"
    )
    parser.add_argument("--eager", action="store_true", help="step: launch every kernel, instead of CUDA graphs")
    parser.add_argument("--no-compile", action="store_true", help="step: leave layers uncompiled")
    parser.add_argument("--repeats", type=int, help=f"timed repetitions (default: {_default('repeats')})")
    parser.add_argument("--profile", action="store_true", help="step, decode: GPU time by kernel family")
    parser.add_argument("--json", type=Path, help="write the figures here")


def run(args: argparse.Namespace) -> int:
    import torch
    from rich.console import Console
    from rich.table import Table

    from infir2.benchmark import decode, kernels, step
    from infir2.launch.environment import environment
    from infir2.parallel.device import enough_memory

    choose_size(args, torch.cuda.is_available())
    if args.json:
        check_output(args.json, "--json")
    benches = {
        "step": step.run,
        "decode": decode.run,
        "gemm": kernels.gemm,
        "quantize": kernels.quantize,
        "attention": kernels.attention,
    }
    with enough_memory(f"bench {args.what}", _smaller(args)):
        rows = benches[args.what](args, _tell)
    console = Console()
    for number, keys in enumerate(_tables(rows, console.width)):
        table = Table(title=f"bench {args.what}: {args.model}, {args.batch} x {args.length}" if number == 0 else None)
        for key in keys:
            justify: Literal["left", "right"] = "left" if isinstance(rows[0][key], str) else "right"
            table.add_column("\n".join(_heading(key)), justify=justify, no_wrap=True)
        for row in rows:
            table.add_row(*(_text(row.get(key)) for key in keys))
        console.print(table)
    if args.json:
        write_output(args.json, json.dumps({**environment(), "rows": rows}, indent=1) + "\n")
    return 0


def choose_size(args: argparse.Namespace, on_gpu: bool) -> None:
    """Fill in what was not given. Raises ConfigError for sizes that measure nothing, and for a model that is too large
    without a GPU."""
    from infir2.model.presets import PRESETS

    for name, choices in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, choices[0 if on_gpu else 1])
    # A sequence's first new token comes with its prompt: what follows is what decoding is timed by.
    for name, least in (("batch", 1), ("length", 1), ("repeats", 1), ("new", 2), ("layers", 0)):
        if (value := getattr(args, name)) < least:
            raise ConfigError(f"--{name} {value}: give at least {least}")
    if args.model not in PRESETS:
        hint = did_you_mean(args.model, PRESETS)
        raise ConfigError(f"--model {args.model}: no such preset; there are {', '.join(PRESETS)}.{hint}")
    if on_gpu:
        return
    if args.model not in WITHOUT_GPU:
        raise ConfigError(
            f"--model {args.model}: no GPU here, and a CPU would take hours; give one of {', '.join(WITHOUT_GPU)}"
        )
    _tell(
        f"no GPU here: FP8 is emulated; {args.model}, {args.batch} x {args.length} tokens, {args.repeats} repetitions"
    )


def _smaller(args: argparse.Namespace) -> str:
    """What makes a bench need less memory."""
    lower = [f"lower --{name} ({value})" for name in ("batch", "length") if (value := getattr(args, name)) > 1]
    return " or ".join([*lower, f"take another --model ({args.model})"])


def _default(name: str) -> str:
    on_gpu, without = DEFAULTS[name]
    return f"{on_gpu}; without a GPU {without}"


def _tell(what: str) -> None:
    """On stderr: what is measured right now, beside the table that may go to a file."""
    print(what, file=sys.stderr, flush=True)


def _tables(rows: list[dict[str, Any]], width: int) -> list[list[str]]:
    """The columns of each table to print, as many as fit its width beside those that say what a row is about."""
    keys = [key for key, value in rows[0].items() if not isinstance(value, dict)]
    texts = {key: [*_heading(key), *(_text(row.get(key)) for row in rows)] for key in keys}
    takes = {key: max(map(len, texts[key])) + 3 for key in keys}
    names = list(itertools.takewhile(lambda key: isinstance(rows[0][key], str), keys))
    free = width - 1 - sum(takes[key] for key in names)
    tables: list[list[str]] = [[]]
    for key in keys[len(names) :]:
        if tables[-1] and sum(takes[one] for one in tables[-1]) + takes[key] > free:
            tables.append([])
        tables[-1].append(key)
    return [[*names, *table] for table in tables]


def _heading(key: str) -> list[str]:
    """A column's name in lines, broken between words."""
    return textwrap.wrap(key, max(10, *map(len, key.split())))


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"
    return "-" if value is None else str(value)
