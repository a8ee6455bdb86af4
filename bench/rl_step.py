"""One step of reinforcement learning, FP8 beside BF16: seconds by phase, and how far trainer and engine are apart.

    python bench/rl_step.py --model models/Qwen2.5-1.5B --prompts 32 --samples 8 --new-tokens 1024 --json FILE.json
    python bench/rl_step.py --preset tiny --dtype float32 --prompts 2 --samples 4 --new-tokens 32    (a CPU)

Runs `infir2 rl` for a few steps and takes the median of all but the first. Groups are not filtered, so that every step
samples and trains on the same number of responses; a preset has random weights, whose responses reach the limit.
Then the FP8 engine's samples are read by an FP8 trainer and by a BF16 trainer with the same master weights.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from infir2.config import RlConfig
from infir2.data.tokenizer import load_tokenizer, train_tokenizer
from infir2.data.worked_solutions import worked_examples
from infir2.model.attention import document_attention
from infir2.parallel.runtime import world
from infir2.rl.batch import TrainingSample, pack_samples
from infir2.rl.objective import batch_logprobs
from infir2.rl.policy_loss import mismatch
from infir2.rollout.engine import Engine
from infir2.rollout.records import Request, SamplingParams
from infir2.stages.environment import environment
from infir2.stages.rl import engine_options, reference_model, train_rl
from infir2.stages.sft import open_model
from infir2.train.metrics import read_metrics
from infir2.types import IGNORE

PHASES = ("rollout_s", "reward_s", "logprob_s", "sync_s", "update_s")


def recipe(out: Path, precision: str, options: argparse.Namespace) -> RlConfig:
    model = {"path": options.model} if options.model else {"preset": options.preset}
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
            "max_batch_tokens": max(2048, options.sequences),
        },
        "reward": {"kind": "reasoning_gym"},
        "optim": {"lr": 1e-6, "schedule": "constant", "betas": (0.9, 0.98)},
        "train": {
            "steps": options.steps,
            "global_batch": options.prompts * options.samples,
            "eval_every": 0,
            "save_every": 0,
            "activation_checkpointing": "full",
        },
        "log": {"tensorboard": False},
    }
    return RlConfig.model_validate(table)


def phases(run: Path) -> dict[str, float]:
    """Median seconds of each phase, the whole step, the engine's tokens a second, and the share of the weight sync."""
    steps = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"][1:]
    medians = {name: statistics.median(s[name] for s in steps) for name in (*PHASES, "step_time_s")}
    speed = statistics.median(s["rollout_tokens_per_s"] for s in steps)
    memory = max(s.get("peak_memory_gb", 0.0) for s in steps)
    return {
        **medians,
        "sync_share": medians["sync_s"] / medians["step_time_s"],
        "rollout_tokens_per_s": speed,
        "response_length": statistics.median(s["response_length"] for s in steps),
        "logprob_diff": statistics.fmean(s["logprob_diff"] for s in steps),
        "token_mult_prob_error": statistics.fmean(s["token_mult_prob_error"] for s in steps),
        "peak_memory_gb": memory,
    }


def mismatches(configs: dict[str, RlConfig], here: Any) -> dict[str, dict[str, float]]:
    """The FP8 engine's samples under trainers of both precisions, on equal weights."""
    config = configs["blockwise"]
    _, folder, architecture = open_model(config)
    models = {name: reference_model(c, architecture, here) for name, c in configs.items()}
    engine = Engine(models["blockwise"], load_tokenizer(folder), engine_options(config))
    generator = torch.Generator().manual_seed(1)
    params = SamplingParams(max_new_tokens=min(256, config.rollout.max_new_tokens), n=4)
    limit = min(1000, architecture.vocab_size)
    prompts = [tuple(torch.randint(5, limit, (64,), generator=generator).tolist()) for _ in range(8)]
    groups = engine.generate([Request(prompt, params) for prompt in prompts])
    samples = [TrainingSample(p, c.token_ids, c.logprobs, 0.0) for p, group in zip(prompts, groups) for c in group]
    dtype, found = getattr(torch, config.model.dtype), {}
    for name, model in models.items():
        sums: dict[str, float] = {}
        batches = pack_samples(samples, config.data.max_tokens_per_gpu)
        for batch in batches:
            trained = batch.labels != IGNORE
            values = batch_logprobs(model, batch, lambda b: document_attention(b, dtype), 1.0)
            for key, value in mismatch(values[trained], batch.behaviour[trained]).items():
                sums[key] = sums.get(key, 0.0) + value.double().sum().item()
        tokens = sum(len(sample.response_ids) for sample in samples)
        found[f"{name} trainer, blockwise engine"] = {key: value / tokens for key, value in sums.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="Hugging Face folder")
    source.add_argument("--preset", help="random weights of this architecture")
    parser.add_argument("--dtype", default="bfloat16", help="what is not FP8 is computed in this dtype")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=256, help="samples that run at once")
    parser.add_argument("--batch-tokens", type=int, default=16_384, help="tokens of one forward pass of the trainer")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, world() as here:
        out = Path(folder)
        rows = [e.prompt_row() for e in worked_examples(1, options.prompts * options.steps, 1)]
        (out / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        if not options.model:
            train_tokenizer([row["prompt"] for row in rows], 512, out / "tokenizer")
        configs = {precision: recipe(out, precision, options) for precision in ("bf16", "blockwise")}
        results = {}
        for precision, config in configs.items():
            assert train_rl(config, here) is None
            results[precision] = phases(Path(config.run))
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        record = {**environment(), "settings": settings, "steps": results, "mismatch": mismatches(configs, here)}
    print(json.dumps({key: record[key] for key in ("steps", "mismatch")}, indent=1))
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
