"""The whole job on this machine, in minutes and with nothing downloaded: `infir2 demo`.

Prepares the installed Python standard library as a corpus, trains a tiny model in BF16 and in FP8 from the same seed
on the same batches, kills the FP8 run with SIGKILL half-way and resumes it, and writes a report with both. Interrupt
it whenever you like: the same command goes on where it stopped.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from infir2.config import CptConfig, to_toml
from infir2.durable import replace_file
from infir2.errors import ConfigError, DataError, TrainingStopped

STEPS, MIN_STEPS = 100, 4
CORPUS_BYTES = 12_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything (runs/demo)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps of each run ({STEPS})")


def run(args: argparse.Namespace) -> int:
    if args.steps < MIN_STEPS:
        raise ConfigError(f"--steps {args.steps}: at least {MIN_STEPS}, or there is no half-way to kill a run at")
    console = Console()
    started = time.monotonic()
    out: Path = args.out
    _stage(console, 1, "prepare the Python standard library as corpus, and train a tokenizer on it")
    _prepare(out / "data", console)
    _stage(console, 2, f"train a tiny model in BF16, {args.steps} steps")
    _train(_write_recipe(out, "bf16", args.steps))
    _stage(console, 3, f"train the same model in FP8 (blockwise), {args.steps} steps; killed half-way and resumed")
    recipe = _write_recipe(out, "fp8", args.steps)
    _train_until_killed(recipe, out / "fp8", args.steps // 2, console)
    _train(recipe)
    _stage(console, 4, "write the report")
    report = out / "report.html"
    _finish(out, report, console)
    console.print(f"done in {time.monotonic() - started:.0f} s; open [bold]{report}[/bold]")
    return 0


def demo_config(out: Path, name: str, steps: int) -> CptConfig:
    """The recipe of one of the two runs; they differ in ``fp8.recipe`` alone."""
    table: dict[str, Any] = {
        "run": str(out / name),
        "model": {"preset": "tiny"},
        "fp8": {"recipe": "blockwise" if name == "fp8" else "bf16", "health_every": max(steps // 4, 1)},
        "data": {"sources": {str(out / "data"): 1.0}, "seq_len": 256},
        "optim": {"lr": 3e-3, "min_lr": 3e-4, "warmup_steps": steps // 10, "decay_steps": steps // 4},
        "train": {
            "steps": steps,
            "global_batch": 8,
            "micro_batch": 8,
            "eval_every": max(steps // 4, 1),
            "eval_sequences": 32,
            "save_every": max(steps // 4, 1),
            "keep_checkpoints": 2,
        },
    }
    return CptConfig.model_validate(table)


def _stage(console: Console, number: int, text: str) -> None:
    console.print(f"\n[bold cyan]{number}/4[/bold cyan] {text}")


def _prepare(folder: Path, console: Console) -> None:
    from infir2.data.dataset import Dataset
    from infir2.stages.prepare import STDLIB_EXCLUDE, prepare, stdlib_source

    try:
        Dataset(folder)
        console.print(f"{folder} is there already")
        return
    except DataError:
        pass
    prepare(
        [stdlib_source()],
        folder,
        extensions=(".py",),
        exclude=STDLIB_EXCLUDE,
        vocab_size=4096,
        max_bytes=CORPUS_BYTES,
        console=console,
    )


def _write_recipe(out: Path, name: str, steps: int) -> Path:
    path, text = out / f"{name}.toml", to_toml(demo_config(out, name, steps))
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ConfigError(f"{path}: an earlier demo had other settings (such as --steps). Choose another --out")
    replace_file(path, text.encode())
    return path


def _train(recipe: Path) -> None:
    """Run `infir2 cpt` to its end; on resume it goes on by itself."""
    code = subprocess.run([sys.executable, "-m", "infir2", "cpt", str(recipe)]).returncode
    if code:
        raise TrainingStopped(f"{recipe}: training ended with exit code {code}; run `infir2 demo` again to go on")


def _train_until_killed(recipe: Path, run_folder: Path, step: int, console: Console) -> None:
    """Start the run and kill it without warning once it has passed ``step``; nothing to do where it is past it."""
    if _newest_step(run_folder) >= step:
        return
    process = subprocess.Popen([sys.executable, "-m", "infir2", "cpt", str(recipe)])
    try:
        while process.poll() is None and _steps_done(run_folder) <= step:
            time.sleep(0.05)
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            console.show_cursor()
    console.print(
        f"\nkilled with SIGKILL after step {_steps_done(run_folder)}; the newest checkpoint is of step "
        f"{_newest_step(run_folder)}. The same command again:"
    )


def _steps_done(run_folder: Path) -> int:
    from infir2.train.metrics import read_metrics

    path = run_folder / "metrics.jsonl"
    return max((line["step"] for line in read_metrics(path)), default=0) if path.exists() else 0


def _newest_step(run_folder: Path) -> int:
    folders = (run_folder / "checkpoints").glob("step-*")
    return max((int(folder.name.removeprefix("step-")) for folder in folders), default=0)


def _finish(out: Path, report: Path, console: Console) -> None:
    from infir2.report import write_report
    from infir2.train.metrics import read_metrics

    write_report([out / "bf16", out / "fp8"], report, labels=["BF16", "FP8 blockwise"])
    losses = {}
    for name in ("bf16", "fp8"):
        evals = [line for line in read_metrics(out / name / "metrics.jsonl") if line["kind"] == "eval"]
        losses[name] = evals[-1]["eval_loss"]
    change = losses["fp8"] / losses["bf16"] - 1
    console.print(
        f"held-out loss: BF16 {losses['bf16']:.4f}, FP8 {losses['fp8']:.4f} ({change:+.2%}). One seed and a tiny "
        "model: see docs/ for the experiment with seeds and intervals"
    )
