"""What FP8 health costs: a training step of the 1.5B shape, and the pass that measures health, side by side.

    python bench/health_cost.py RESULT.json
    python bench/health_cost.py RESULT.json --check      # the same code at a tiny shape: runs on a CPU in seconds

recipes/cpt_1.5b.toml with random weights and tokens, ``hybrid``, as it runs: compiled layers and CUDA graphs. A step is
what training does between two looks at health: forward and backward over one or eight micro-batches, and AdamW. The
pass is eager, over the first tokens of a micro-batch (--tokens) or all of it, with measuring and without. Shares are
those of a pass every fp8.health_every steps.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from infir2.config import CptConfig, load
from infir2.fp8.convert import refresh_weights
from infir2.fp8.health import measure
from infir2.launch.environment import environment
from infir2.launch.model import build_model, model_config
from infir2.launch.training import seed_everything
from infir2.model.attention import document_attention
from infir2.model.transformer import CausalLM
from infir2.parallel.runtime import World, world
from infir2.train.graphs import Graphs, can_record
from infir2.train.optimizer import build_optimizer
from infir2.train.step import train_step, trial_pass
from infir2.types import Batch

RECIPE = Path(__file__).parents[1] / "recipes/cpt_1.5b.toml"


def recipe(options: argparse.Namespace, rows: int, length: int) -> CptConfig:
    """The shipped recipe at the wanted shape."""
    name, vocabulary = ("micro", 512) if options.check else ("qwen2.5-1.5b", 151_936)
    words = {
        "model": f'{{ preset = "{name}", vocab_size = {vocabulary} }}',
        "fp8.recipe": options.precision,
        "data.seq_len": length,
        "train.micro_batch": rows,
        "train.activation_checkpointing": options.checkpointing,
        "train.compile": str(not options.check).lower(),
    }
    return load(CptConfig, RECIPE, [word for key, value in words.items() for word in (f"--{key}", str(value))])


def random_batch(rows: int, length: int, vocabulary: int) -> Batch:
    tokens = torch.randint(0, vocabulary, (rows, length + 1))
    ends = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
    positions = torch.arange(length).expand(rows, length)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), positions.contiguous(), ends, length)


def measure_shape(options: argparse.Namespace, rows: int, length: int, here: World) -> dict[str, Any]:
    config = recipe(options, rows, length)
    seed_everything(config)
    model, report = build_model(config, model_config(config, 0), here)
    refresh_weights(model)
    batch = random_batch(rows, length, model.config.vocab_size)
    steps = time_steps(options, config, model, batch, here)
    free(here)
    every = config.fp8.health_every
    return {
        "shape": f"{rows} x {length}",
        "fp8_layers": len(report.converted),
        "step_ms by micro-batches": steps,
        "health_every": every,
        "pass": time_pass(options, model, batch.beginning(options.tokens), here, steps, every),
        "pass over all tokens": time_pass(options, model, batch, here, steps, every),
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3) if here.device.type == "cuda" else None,
    }


def time_steps(
    options: argparse.Namespace, config: CptConfig, model: CausalLM, batch: Batch, here: World
) -> dict[int, float]:
    """Number of micro-batches -> median milliseconds of a training step."""
    optimizer = build_optimizer(model, config.optim)
    graphs = Graphs(model) if can_record(here) and not options.eager else None
    dtype = model.model.compute_dtype

    def step(count: int) -> None:
        train_step(
            *(model, optimizer, [batch] * count, here, lambda one: document_attention(one, dtype), config.optim.clip),
            graphs=graphs,
        )

    for _ in range(2):  # compile kernels, record graphs
        step(2)
    return {count: median_ms(partial(step, count), options.repeats, here) for count in (1, 8)}


def time_pass(
    options: argparse.Namespace, model: CausalLM, batch: Batch, here: World, steps: dict[int, float], every: int
) -> dict[str, Any]:
    """Median milliseconds of a pass, with measuring and without, and its share of the time of the steps between two."""
    measuring, without = (
        median_ms(partial(look, model, batch, here, measuring), options.repeats, here) for measuring in (True, False)
    )
    shares = {count: round(measuring / (every * step), 5) for count, step in steps.items()}
    return {"tokens": batch.labels.numel(), "ms": measuring, "ms without measuring": without, "share": shares}


def look(model: CausalLM, batch: Batch, here: World, measuring: bool) -> None:
    """The pass of its own that training makes, up to figures that Python can read."""

    def attention_for(one: Batch) -> Callable:
        return document_attention(one, model.model.compute_dtype)

    with torch.compiler.set_stance("force_eager"):
        if not measuring:
            trial_pass(model, batch, here, attention_for)
            return
        with measure(model) as health:
            trial_pass(model, batch, here, attention_for)
        health.layers()


def median_ms(work: Callable[[], Any], repeats: int, here: World) -> float:
    times = []
    for _ in range(repeats + 1):
        wait(here)
        began = time.perf_counter()
        work()
        wait(here)
        times.append((time.perf_counter() - began) * 1e3)
    return round(statistics.median(times[1:]), 3)


def free(here: World) -> None:
    gc.collect()
    if here.device.type == "cuda":
        torch.cuda.empty_cache()


def wait(here: World) -> None:
    if here.device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    parser.add_argument(
        "--shapes", nargs="+", help="rows x tokens of a micro-batch (1x32768 2x8192; tiny with --check)"
    )
    parser.add_argument("--precision", default="hybrid", help="FP8 recipe (%(default)s)")
    parser.add_argument("--tokens", type=int, help="tokens of a short pass (4096; with --check 64)")
    parser.add_argument("--checkpointing", choices=("none", "attention", "full"), default="none", help="(%(default)s)")
    parser.add_argument("--eager", action="store_true", help="steps without CUDA graphs")
    parser.add_argument("--repeats", type=int, default=5, help="timed repetitions (%(default)s)")
    parser.add_argument("--check", action="store_true", help="a tiny shape, to see that everything runs")
    options = parser.parse_args()
    options.shapes = options.shapes or (["1x256", "2x128"] if options.check else ["1x32768", "2x8192"])
    options.tokens = options.tokens or (64 if options.check else 4096)
    record = environment()
    record["settings"] = {key: value for key, value in vars(options).items() if key != "result"}
    record["rows"] = []
    with world() as here:
        for shape in options.shapes:
            rows, length = map(int, shape.split("x"))
            record["rows"].append(measure_shape(options, rows, length, here))
            print(json.dumps(record["rows"][-1], indent=1), flush=True)
            free(here)
    options.result.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
