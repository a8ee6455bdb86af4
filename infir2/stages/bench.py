"""Measure FP8 against BF16 side by side, in one process: `infir2 bench {step,decode,gemm,quantize}`.

step      forward, forward + backward and optimiser of a whole model with random weights, in each precision
decode    the rollout engine: prompts read and tokens made a second
gemm      the three GEMMs of every linear shape of a model
quantize  the quantiser's kernels: bytes read and written over time

Figures are medians. --json writes them with command, commit, device and versions.
"""

import argparse
import json
from pathlib import Path
from typing import Any

PEERS = ("hf", "torchao:tensorwise", "torchao:rowwise", "torchao:rowwise_with_gw_hp")
PRECISIONS = ("bf16", "blockwise", "hybrid", "rowwise", "tensorwise")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["step", "decode", "gemm", "quantize"])
    parser.add_argument("--model", default="qwen2.5-1.5b", help="preset whose shapes are used (qwen2.5-1.5b)")
    parser.add_argument("--batch", type=int, default=2, help="sequences (2)")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a sequence (8192)")
    parser.add_argument("--new", type=int, default=1024, help="decode: tokens made after a prompt of --length (1024)")
    parser.add_argument("--cache", choices=["auto", "fp8"], default="auto", help="decode: dtype of keys and values")
    parser.add_argument("--layers", type=int, default=0, help="decoder layers (0 = the model's)")
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
        "FP8 output head",
    )
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[], help="step: other implementations to measure")
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
    parser.add_argument("--repeats", type=int, default=10, help="timed repetitions (10)")
    parser.add_argument("--profile", action="store_true", help="step, decode: GPU time by kernel family")
    parser.add_argument("--json", type=Path, help="write the figures here")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from infir2.benchmark import decode, kernels, step
    from infir2.launch.environment import environment

    benches = {"step": step.run, "decode": decode.run}
    rows = (benches | {"gemm": kernels.gemm, "quantize": kernels.quantize})[args.what](args)
    for title, keys in _tables(rows):
        table = Table(title=title or f"bench {args.what}: {args.model}, {args.batch} x {args.length}")
        for key in keys:
            text = isinstance(rows[0][key], str)
            table.add_column(key, justify="left" if text else "right", no_wrap=text, overflow="fold")
        for row in rows:
            table.add_row(*(_text(row.get(key)) for key in keys))
        Console().print(table)
    if args.json:
        record = {**environment(), "rows": rows}
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def _tables(rows: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """(title, columns) of the tables to print: speed and memory of a step do not fit one terminal line."""
    keys = [key for key, value in rows[0].items() if not isinstance(value, dict)]
    if "forward ms" not in keys:
        return [("", keys)]
    shares = [key for key in keys if key.endswith("speed-up")]
    times = [key for key in keys if key.endswith(" ms")]
    others = [key for key in keys[1:] if key not in times and key not in shares]
    return [("", [keys[0], *times, *shares]), ("throughput and memory", [keys[0], *others])]


def _text(value: Any) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else "-" if value is None else str(value)
