"""What FP8 health costs: a training step of the 1.5B shape, and the pass that measures health, side by side.

    python bench/health_cost.py RESULT.json
    python bench/health_cost.py RESULT.json --check      # the same code at a tiny shape: runs on a CPU in seconds

recipes/cpt_1.5b.toml with random weights and tokens, ``hybrid``, as it runs: compiled layers and CUDA graphs. A step is
what training does between two looks at health: forward and backward over one or eight micro-batches, and AdamW. The
pass is eager, over the first tokens of a micro-batch (--tokens) or all of it, with measuring and without. Shares are
those of a pass every fp8.health_every steps.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import Record, settings_of, shipped

from infir2.benchmark.timing import median_ms
from infir2.config import CptConfig
from infir2.fp8.convert import refresh_weights
from infir2.fp8.health import measure
from infir2.launch.model import model_config
from infir2.launch.training import Trainee, build_trainee
from infir2.model.attention import document_attention
from infir2.model.transformer import CausalLM
from infir2.parallel.device import free_memory, fresh_memory, peak_memory
from infir2.parallel.runtime import World, world
from infir2.train.graphs import Graphs, can_record
from infir2.train.step import train_step, trial_pass
from infir2.types import Batch


def recipe(options: argparse.Namespace, rows: int, length: int) -> CptConfig:
    """The shipped recipe at the wanted shape."""
    name, vocabulary = ("micro", 512) if options.check else ("qwen2.5-1.5b", 151_936)
    values = {
        "model": f'{{ preset = "{name}", vocab_size = {vocabulary} }}',
        "fp8.recipe": options.precision,
        "data.seq_len": length,
        "train.micro_batch": rows,
        "train.activation_checkpointing": options.checkpointing,
        "train.compile": str(not options.check).lower(),
    }
    return shipped(CptConfig, "cpt_1.5b", values)


def random_batch(rows: int, length: int, vocabulary: int) -> Batch:
    tokens = torch.randint(0, vocabulary, (rows, length + 1))
    ends = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
    positions = torch.arange(length).expand(rows, length)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), positions.contiguous(), ends, length)


def measure_shape(options: argparse.Namespace, rows: int, length: int, here: World) -> dict[str, Any]:
    config = recipe(options, rows, length)
    trainee = build_trainee(config, model_config(config, 0), here)
    model = trainee.model
    refresh_weights(model)
    batch = random_batch(rows, length, model.config.vocab_size)
    steps = time_steps(options, config, trainee, batch, here)
    free_memory()
    every = config.fp8.health_every
    passes = {
        "pass": time_pass(options, model, batch.beginning(options.tokens), here, steps, every),
        "pass over all tokens": time_pass(options, model, batch, here, steps, every),
    }
    peak = peak_memory(here.device, 1e9)
    return {
        "shape": f"{rows} x {length}",
        "fp8_layers": len(trainee.report.converted),
        "step_ms by micro-batches": steps,
        "health_every": every,
        **passes,
        "peak_memory_gb": peak and round(peak, 3),
    }


def time_steps(
    options: argparse.Namespace, config: CptConfig, trainee: Trainee, batch: Batch, here: World
) -> dict[int, float]:
    """Number of micro-batches -> median milliseconds of a training step."""
    model, optimizer = trainee.model, trainee.optimizer
    graphs = Graphs(model) if can_record(here) and not options.eager else None
    dtype = model.model.compute_dtype

    def step(count: int) -> None:
        train_step(
            *(model, optimizer, [batch] * count, here, lambda one: document_attention(one, dtype), config.optim.clip),
            graphs=graphs,
        )

    for _ in range(2):  # compile kernels, record graphs
        step(2)
    return {count: rounded_ms(partial(step, count), options, here) for count in (1, 8)}


def time_pass(
    options: argparse.Namespace, model: CausalLM, batch: Batch, here: World, steps: dict[int, float], every: int
) -> dict[str, Any]:
    """Median milliseconds of a pass, with measuring and without, and its share of the time of the steps between two."""
    measuring, without = (
        rounded_ms(partial(look, model, batch, here, measuring), options, here) for measuring in (True, False)
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


def rounded_ms(work: Callable[[], Any], options: argparse.Namespace, here: World) -> float:
    """Median milliseconds, once it has been run."""
    work()
    return round(median_ms(work, options.repeats, here.device), 3)


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
    record = Record(options.result, settings_of(options, "result"))
    found = record.values["rows"] = []
    with world() as here:
        for shape in options.shapes:
            rows, length = map(int, shape.split("x"))
            with fresh_memory():
                found.append(measure_shape(options, rows, length, here))
            print(json.dumps(found[-1], indent=1), flush=True)
            record.save()


if __name__ == "__main__":
    main()
