"""One packed 32k step of supervised fine-tuning of the 1.5B shape: FP8 and BF16, time and memory side by side.

    python bench/sft_1.5b_32k.py RESULT.json
    python bench/sft_1.5b_32k.py RESULT.json --check      # the same code at a tiny shape: runs on a CPU in seconds

recipes/sft_1.5b_stage1.toml with random weights. The conversations have random tokens and lengths such as reasoning
data have (half below 6,000 tokens, a tail to 32,768); two thirds of the tokens are trained on. A step here is one
micro-batch, the fullest of a global batch as the loader packs it: forward, backward and AdamW. Every precision sees the
same batches, and starts from the same weights in fresh memory. hybrid/none, bf16/full: a precision and what is said
under train.activation_checkpointing.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import Record, settings_of, shipped

from infir2.benchmark.timing import timed
from infir2.config import SftConfig
from infir2.data.chat import Sample
from infir2.data.sft import SftLoader, TokenRows
from infir2.fp8.convert import refresh_weights
from infir2.launch.model import model_config
from infir2.launch.training import build_trainee
from infir2.model.attention import document_attention
from infir2.parallel.device import fresh_memory, peak_memory, reset_peak
from infir2.parallel.runtime import World, world
from infir2.train.graphs import Graphs, can_record
from infir2.train.step import train_step
from infir2.types import Batch

ROWS = 256


def recipe(options: argparse.Namespace, precision: str) -> SftConfig:
    """The shipped recipe at the wanted shape."""
    name, vocabulary = ("micro", 512) if options.check else ("qwen2.5-1.5b", 151_936)
    recipe_name, _, checkpointing = precision.partition("/")
    values = {
        "model": f'{{ preset = "{name}", vocab_size = {vocabulary} }}',
        "fp8.recipe": recipe_name,
        "data.max_length": options.length,
        "data.max_tokens_per_gpu": options.length,
        "train.compile": str(not options.eager).lower(),
        "train.cuda_graphs": str(not options.eager).lower(),
        "train.activation_checkpointing": checkpointing or "full",
    }
    return shipped(SftConfig, "sft_1.5b_stage1", values)


def micro_batches(config: SftConfig, vocabulary: int, count: int, whole: bool) -> list[Batch]:
    """The fullest micro-batch of each of ``count`` steps."""
    rng = np.random.default_rng(config.train.seed)
    longest = config.data.max_length
    lengths = np.clip(rng.lognormal(np.log(longest * 6_000 / 32_768), 0.9, ROWS), 16, longest).astype(int)
    samples = [Sample(rng.integers(0, vocabulary, n).astype(np.int32), np.arange(n) > n // 3) for n in lengths]
    train, most = config.train, config.data.max_tokens_per_gpu
    loader = SftLoader(TokenRows.join(samples), train.seed, train.global_batch, count, most, whole=whole)
    return [loader.step(step)[0] for step in range(1, count + 1)]


def measure(options: argparse.Namespace, precision: str, here: World) -> dict[str, Any]:
    """Seconds of every step, and the peak of the device's memory over them."""
    config = recipe(options, precision)
    architecture = model_config(config, 0)
    recorded = config.train.cuda_graphs and can_record(here)
    batches = micro_batches(config, architecture.vocab_size, options.warmup + options.steps, recorded)
    trainee = build_trainee(config, architecture, here)
    model, optimizer = trainee.model, trainee.optimizer
    refresh_weights(model)
    attention = partial(document_attention, compute_dtype=getattr(torch, config.model.dtype))
    graphs = Graphs(model) if recorded else None
    seconds, losses = [], []
    for number, batch in enumerate(batches):
        if number == options.warmup:
            reset_peak(here.device)
        step = partial(train_step, model, optimizer, [batch], here, attention, config.optim.clip, graphs=graphs)
        took, result = timed(step, here.device)
        seconds.append(took)
        assert result is not None
        losses.append(result.loss)
        print(f"{precision}: step {number + 1} of {len(batches)}: {seconds[-1]:.3f} s, loss {losses[-1]:.4f}")
    counted, peak = seconds[options.warmup :], peak_memory(here.device, 1e9, reserved=True)
    tokens = [int(batch.cu_seqlens[-1]) for batch in batches[options.warmup :]]
    return {
        "precision": precision,
        "fp8_layers": len(trainee.report.converted),
        "parameters": sum(p.numel() for p in model.parameters()),
        "step_s": [round(value, 4) for value in counted],
        "median_step_s": round(statistics.median(counted), 4),
        "tokens_per_s": round(sum(tokens) / sum(counted), 1),
        "tokens": tokens,
        "documents": [batch.cu_seqlens.numel() - 1 for batch in batches[options.warmup :]],
        "peak_memory_gb": peak and round(peak, 3),
        "losses": [round(loss, 4) for loss in losses],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    parser.add_argument(
        "--precision",
        nargs="+",
        default=["bf16/full", "hybrid/full", "hybrid/none", "blockwise/none"],
        help="the first is compared to (%(default)s)",
    )
    parser.add_argument("--length", type=int, help="tokens of a micro-batch (32768; with --check 512)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps (%(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (%(default)s)")
    parser.add_argument("--eager", action="store_true", help="neither compiled layers nor CUDA graphs")
    parser.add_argument("--check", action="store_true", help="a tiny shape, to see that everything runs")
    options = parser.parse_args()
    options.length = options.length or (512 if options.check else 32_768)
    record = Record(options.result, settings_of(options, "result"))
    rows: list[dict[str, Any]] = []
    with world() as here:
        for precision in options.precision:
            with fresh_memory():
                rows.append(measure(options, precision, here))
    for row in rows:
        row["speed_up"] = round(rows[0]["median_step_s"] / row["median_step_s"], 3)
        if row["peak_memory_gb"]:
            row["memory_ratio"] = round(row["peak_memory_gb"] / rows[0]["peak_memory_gb"], 3)
    record.values["rows"] = rows
    record.save()
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
