"""The pre-training recipe under torchrun on some numbers of GPUs: speed, memory, the same losses, and another number of
GPUs after a SIGKILL.

    python bench/scaling.py WORK_FOLDER RESULT.json --gpus 1 4
    python bench/scaling.py WORK_FOLDER RESULT.json --gpus 1 4 --layouts sharded replicated
    python bench/scaling.py WORK_FOLDER RESULT.json --gpus 1 2 --check      # a tiny model in processes on a CPU

recipes/cpt_1.5b.toml with random weights of Qwen2.5-1.5B's shape, 8,192 tokens a sequence, Python's own library as
text. For every precision, number of GPUs and layout (sharded by FSDP2, or replicated: the whole model on every GPU) a
few steps of the same global batch; then the first precision, in each layout, is killed on the largest number of GPUs
after a checkpoint, every process of it, and goes on with --after as many.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

from record import RECIPES, Record, override_words, settings_of, train_lines

WARM_UP = 3  # steps that compile, or find memory for the first time
LAYOUTS = ("sharded", "replicated")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORK_FOLDER")
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 4], help="how many, in turn (1 4)")
    parser.add_argument("--after", type=int, help="GPUs after the kill (the least of --gpus)")
    parser.add_argument("--layouts", choices=LAYOUTS, nargs="+", default=["sharded"], help="of several GPUs (sharded)")
    parser.add_argument("--precisions", nargs="+", default=["hybrid", "bf16"], help="FP8 recipes (hybrid bf16)")
    parser.add_argument("--sequences", type=int, default=16, help="of a global batch (%(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="of each run (%(default)s)")
    parser.add_argument("--check", action="store_true", help="a tiny model, to see that everything runs")
    options = parser.parse_args()
    record = Record(options.result, settings_of(options, "work", "result"))
    with record.phase("prepare"):
        prepare(options)
    runs = record.values["runs"] = []
    for precision in options.precisions:
        for gpus in options.gpus:
            for layout in layouts_on(options, gpus):
                with record.phase(f"{precision} on {gpus}, {layout}"):
                    run = run_to_the_end(options, precision, gpus, layout)
                    runs.append({"precision": precision, "gpus": gpus, "layout": layout, **figures(run)})
    killed, most = record.values.setdefault("killed", []), max(options.gpus)
    for layout in layouts_on(options, most):
        with record.phase(f"killed and resumed, {layout}"):
            killed.append(killed_and_resumed(options, options.precisions[0], most, layout))
    print(json.dumps(record.values, indent=1))


def layouts_on(options: argparse.Namespace, gpus: int) -> list[str]:
    """One GPU has no two ways to hold a model."""
    return options.layouts if gpus > 1 else ["whole"]


def prepare(options: argparse.Namespace) -> None:
    words = ["--extensions", ".py", "--exclude", "site-packages", "--vocab-size", "4096", "--max-bytes", "16000000"]
    out = ["--out", str(options.work / "data")]
    infir2 = [sys.executable, "-m", "infir2"]
    subprocess.run([*infir2, "prepare", sysconfig.get_path("stdlib"), *out, *words], check=True)


def command(
    options: argparse.Namespace, run: Path, precision: str, gpus: int, layout: str, save_every: int
) -> list[str]:
    preset, vocabulary, length = ("micro", 4096, 128) if options.check else ("qwen2.5-1.5b", 151_936, 8192)
    overrides = {
        "run": run,
        "model": f'{{ preset = "{preset}", vocab_size = {vocabulary} }}',
        "fp8.recipe": precision,
        "fp8.health_every": 0,
        "data.seq_len": length,
        "data.sources": f'{{ "{options.work / "data"}" = 1.0 }}',
        "optim.warmup_steps": 2,
        "optim.decay_steps": 0,
        "train.steps": options.steps,
        "train.global_batch": options.sequences,
        "train.micro_batch": 2,
        "train.eval_every": 0,
        "train.save_every": save_every,
        "train.keep_every": 0,
        "train.keep_checkpoints": 1,
        "train.compile": str(not options.check).lower(),
        "parallel.replicate": gpus if layout == "replicated" else 1,
    }
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus), "-m", "--"]
    return [sys.executable, *torchrun, "infir2", "cpt", str(RECIPES / "cpt_1.5b.toml"), *override_words(overrides)]


def folder_of(options: argparse.Namespace, precision: str, gpus: int, layout: str) -> Path:
    return options.work / f"{precision}-{gpus}-{layout}"


def run_to_the_end(options: argparse.Namespace, precision: str, gpus: int, layout: str) -> Path:
    run = folder_of(options, precision, gpus, layout)
    subprocess.run(command(options, run, precision, gpus, layout, 0), check=True)
    return run


def figures(run: Path) -> dict[str, Any]:
    lines = train_lines(run)
    seconds = statistics.median(line["step_time_s"] for line in lines[WARM_UP:])
    return {
        "step_time_s": round(seconds, 4),
        "tokens/s": round(lines[-1]["valid_tokens"] / seconds),
        "peak_memory_gb of rank 0": max(line.get("peak_memory_gb", 0.0) for line in lines),
        "losses": [line["loss"] for line in lines],
    }


def killed_and_resumed(options: argparse.Namespace, precision: str, gpus: int, layout: str) -> dict[str, Any]:
    """The losses of a run that lost its first processes, beside those of the run that was left alone."""
    run, half, after = options.work / f"killed-{layout}", options.steps // 2, options.after or min(options.gpus)
    print(f"{precision} on {gpus}, {layout}, to be killed", flush=True)
    process = subprocess.Popen(command(options, run, precision, gpus, layout, half))
    while process.poll() is None:
        if (run / f"checkpoints/step-{half:06d}").exists() and len(train_lines(run)) > half:
            kill_all(str(run))
        time.sleep(0.02)
    before = [line["step"] for line in train_lines(run)]
    print(f"{precision} on {after}, after the kill", flush=True)
    subprocess.run(command(options, run, precision, after, layout, half), check=True)
    losses = [line["loss"] for line in train_lines(run)]
    alone = [line["loss"] for line in train_lines(folder_of(options, precision, gpus, layout))]
    return {
        "gpus": [gpus, after],
        "layout": layout,
        "exit status": process.returncode,
        "last step before": max(before),
        "losses": losses,
        "largest relative difference": max(abs(a / b - 1) for a, b in zip(losses, alone, strict=True)),
    }


def kill_all(word: str) -> None:
    """SIGKILL to torchrun and its ranks, which have sessions of their own: all that were given the run's folder."""
    for arguments in Path("/proc").glob("[0-9]*/cmdline"):
        pid = int(arguments.parent.name)
        try:
            if pid != os.getpid() and word.encode() in arguments.read_bytes().split(b"\0"):
                os.kill(pid, signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            pass  # it has ended meanwhile


if __name__ == "__main__":
    main()
