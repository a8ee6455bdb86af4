"""One step of reinforcement learning, FP8 beside BF16: seconds by phase, and how far trainer and engine are apart.

    python bench/rl_step.py --model models/Qwen2.5-1.5B --json FILE.json
    python bench/rl_step.py --preset qwen2.5-1.5b --json FILE.json               (its shape, with random weights)
    python bench/rl_step.py --preset tiny --dtype float32 --prompts 2 --samples 4 --new-tokens 32    (a CPU)

First the FP8 engine samples, and an FP8 and a BF16 trainer with the same master weights read its tokens. Then each
precision does a few steps of `infir2 rl`, by the same loop but without checkpoints; the figures are medians of all
steps but the first, which compiles kernels. Groups are not filtered, so that every step samples and trains on the same
number of responses; random weights make responses that reach the limit.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from exam import question
from record import Record, settings_of, write_rows

from infir2.config import RlConfig
from infir2.data.chat import ChatTokenizer
from infir2.data.tokenizer import load_tokenizer, train_tokenizer
from infir2.data.worked_solutions import worked_examples
from infir2.fp8.convert import refresh_weights
from infir2.launch.chat_model import open_model
from infir2.launch.rl_stage import RlStage, engine_options
from infir2.launch.training import Trainee, build_trainee, train_stage
from infir2.model.attention import document_attention
from infir2.model.config import ModelConfig
from infir2.model.presets import PRESETS
from infir2.model.transformer import CausalLM
from infir2.parallel.device import free_memory, reset_peak
from infir2.parallel.runtime import World, world
from infir2.rl.batch import TrainingSample, pack_samples
from infir2.rl.objective import batch_logprobs
from infir2.rl.policy_loss import mismatch
from infir2.rollout.engine import Engine
from infir2.rollout.records import Request, SamplingParams
from infir2.stages.rl import make_scorer, read_data
from infir2.train.metrics import MetricsWriter, read_metrics
from infir2.types import IGNORE

PHASES = ("rollout_s", "reward_s", "logprob_s", "sync_s", "update_s")
PRECISIONS = ("blockwise", "bf16")
FAMILIES = ("chain_sum", "products", "gcd")  # short questions


def recipe(out: Path, precision: str, options: argparse.Namespace) -> RlConfig:
    model: dict[str, Any] = {"path": options.model}
    if options.preset:
        model = {"preset": options.preset, "vocab_size": PRESETS[options.preset].vocab_size}
    longest = 256 + options.new_tokens
    table: dict[str, Any] = {
        "run": str(out / precision),
        "model": {**model, "dtype": options.dtype},
        "fp8": {"recipe": precision, "health_every": 0},
        "data": {
            "train": str(out / "prompts.jsonl"),
            "max_prompt_tokens": 256,
            "max_tokens_per_gpu": max(longest, options.batch_tokens),
            **({} if options.model else {"tokenizer": str(out / "tokenizer")}),
        },
        "rollout": {
            "prompts": options.prompts,
            "samples": options.samples,
            "max_new_tokens": options.new_tokens,
            "filter_groups": False,
            "cache_tokens": longest * min(options.sequences, options.prompts * options.samples) + 4096,
            "max_sequences": options.sequences,
            "max_batch_tokens": max(8192, options.sequences),
        },
        "reward": {"kind": "reasoning_gym"},
        # Random weights earn no reward, and so no advantage; the entropy gives the backward pass gradients that are
        # not zero, which a GPU would multiply faster than others.
        "policy": {"entropy_coef": 1e-3},
        "optim": {"lr": 1e-6, "schedule": "constant", "betas": (0.9, 0.98)},
        "train": {
            "steps": options.steps,
            "global_batch": options.prompts * options.samples,
            "eval_every": 0,
            "compile": options.compile,
        },
        "log": {"tensorboard": False},
    }
    return RlConfig.model_validate(table)


def run_steps(
    config: RlConfig, here: World, trainee: Trainee, opened: tuple[ChatTokenizer, Path, ModelConfig]
) -> dict[str, float]:
    """Do the recipe's steps; what they took."""
    chat, folder, architecture = opened
    reset_peak(here.device)
    with (
        closing(make_scorer(config.reward)) as scorer,
        MetricsWriter(Path(config.run), config.train.steps, tensorboard=False) as metrics,
    ):
        data = read_data(config, chat, scorer, False)
        stage = RlStage(config, architecture, chat, folder, data, scorer, here).stage_data()
        # Without checkpoints: many GB of random weights.
        stopped = train_stage(config, here, stage, trainee, metrics)
    if stopped:
        raise SystemExit(128 + stopped)
    return phases(Path(config.run))


def phases(run: Path) -> dict[str, float]:
    """Median seconds of each phase, the whole step, the engine's tokens a second, and the share of the weight sync."""
    steps = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"][1:]
    medians = {name: statistics.median(s[name] for s in steps) for name in (*PHASES, "step_time_s")}
    return {
        **medians,
        "sync_share": medians["sync_s"] / medians["step_time_s"],
        "rollout_tokens_per_s": statistics.median(s["rollout_tokens_per_s"] for s in steps),
        "update_tokens": statistics.median(s["valid_tokens"] for s in steps),
        "response_length": statistics.median(s["response_length"] for s in steps),
        "logprob_diff": statistics.fmean(s["logprob_diff"] for s in steps),
        "token_mult_prob_error": statistics.fmean(s["token_mult_prob_error"] for s in steps),
        "peak_memory_gb": max(s.get("peak_memory_gb", 0.0) for s in steps),
    }


def engine_samples(
    model: CausalLM, tokenizer: Path, config: RlConfig, prompts: Sequence[Sequence[int]], samples: int, new_tokens: int
) -> list[TrainingSample]:
    """What the model's engine answers at temperature 1, with the log-probabilities that it drew the tokens with."""
    engine = Engine(model, load_tokenizer(tokenizer), engine_options(config))
    params = SamplingParams(max_new_tokens=new_tokens, n=samples, seed=1)
    requests = [Request(tuple(prompt), params) for prompt in prompts]
    groups = engine.generate(requests)
    engine.sleep()
    return [TrainingSample(r.prompt_ids, c.token_ids, c.logprobs, 0.0) for r, g in zip(requests, groups) for c in g]


def mean_mismatch(model: CausalLM, samples: Sequence[TrainingSample], config: RlConfig) -> dict[str, float]:
    """How far the trainer's log-probabilities are from the engine's, mean over the samples' tokens."""
    dtype = getattr(torch, config.model.dtype)
    sums: dict[str, float] = {}
    for batch in pack_samples(samples, config.data.max_tokens_per_gpu):
        trained = batch.labels != IGNORE
        values = batch_logprobs(model, batch, lambda b: document_attention(b, dtype), 1.0)
        for key, value in mismatch(values[trained], batch.behaviour[trained]).items():
            sums[key] = sums.get(key, 0.0) + value.double().sum().item()
    tokens = sum(len(sample.response_ids) for sample in samples)
    return {key: value / tokens for key, value in sums.items()}


def measure(out: Path, here: World, options: argparse.Namespace, record: Record) -> None:
    steps: dict[str, Any] = {}
    apart: dict[str, Any] = {}
    record.values |= {"steps": steps, "mismatch": apart}
    samples: list[TrainingSample] = []
    for precision in PRECISIONS:
        config = recipe(out, precision, options)
        chat, folder, architecture = opened = open_model(config)
        trainee = build_trainee(config, architecture, here)
        refresh_weights(trainee.model)
        record.tell(f"{precision}: model built")
        if not samples:
            examples = worked_examples(1, 8, 2, families=FAMILIES)
            prompts = [chat.prompt([question(example)]) for example in examples]
            samples = engine_samples(trainee.model, folder, config, prompts, 4, min(256, options.new_tokens))
        apart[f"{precision} trainer, blockwise engine"] = mean_mismatch(trainee.model, samples, config)
        record.tell(f"{precision}: {json.dumps(apart)}")
        steps[precision] = run_steps(config, here, trainee, opened)
        record.tell(f"{precision}: {json.dumps(steps[precision])}")
        record.save()
        del trainee
        free_memory()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="Hugging Face folder")
    source.add_argument("--preset", choices=PRESETS, help="random weights of this architecture")
    parser.add_argument("--dtype", default="bfloat16", help="what is not FP8 is computed in this dtype")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=256, help="samples that run at once")
    parser.add_argument("--batch-tokens", type=int, default=16_384, help="tokens of one forward pass of the trainer")
    parser.add_argument("--compile", action="store_true", help="compile the trainer's layers, as the recipes do")
    parser.add_argument("--steps", type=int, default=4, help="of each precision, the first of which is not counted")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    record = Record(options.json, settings_of(options, "json"))
    with tempfile.TemporaryDirectory() as folder, world() as here:
        out = Path(folder)
        examples = worked_examples(1, options.prompts * options.steps, 1, families=FAMILIES)
        rows = [example.prompt_row() for example in examples]
        write_rows(out / "prompts.jsonl", rows)
        if not options.model:
            train_tokenizer([row["prompt"] for row in rows], 512, out / "tokenizer")
        measure(out, here, options, record)
    print(json.dumps({key: record.values[key] for key in ("steps", "mismatch")}, indent=1))


if __name__ == "__main__":
    main()
