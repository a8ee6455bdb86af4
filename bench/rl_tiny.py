"""Does two-stage reinforcement learning raise a tiny model's reward, in FP8 as without? On a laptop CPU, in minutes.

    python bench/rl_tiny.py --out runs/rl_tiny_bench --seeds 1 2 3 --json bench/results/FILE.json

Fine-tunes a model of 0.9 million parameters on worked examples (`infir2 sft`), then trains it from there through
`infir2 rl`'s two stages, for every seed with and without FP8; the seed decides prompts and samples. Held-out reward is
the mean over held-out questions, 4 samples each, at temperature 1. Finished stages are not repeated, unfinished ones
resume.
"""

import argparse
import dataclasses
import json
import statistics
from itertools import product
from pathlib import Path
from typing import Any

import torch

from infir2.checkpoint.huggingface import write_folder
from infir2.config import RlConfig, SftConfig
from infir2.data import tokenizer as tok
from infir2.data.worked_solutions import worked_examples
from infir2.model.presets import PRESETS
from infir2.model.transformer import CausalLM
from infir2.parallel.runtime import World
from infir2.stages.environment import environment
from infir2.stages.rl import train_rl
from infir2.stages.sft import train_sft
from infir2.train.metrics import read_metrics

TAUGHT = ("spell_backward", "gcd", "letter_counting", "basic_arithmetic")
FAMILIES = ("letter_counting", "gcd")
WORLD = World(0, 1, torch.device("cpu"), None)
PRECISIONS = {"bf16": "no FP8", "blockwise": "FP8"}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_prompts(out: Path) -> None:
    """Questions of both stages, to train on and held out."""
    for stage in (1, 2):
        for name, count, split in (("train", 1500, "train"), ("held_out", 96, "held_out")):
            rows = [e.prompt_row() for e in worked_examples(stage, count, 7, split, FAMILIES)]
            write_jsonl(out / f"{name}{stage}.jsonl", rows)


def write_start(out: Path) -> None:
    """Examples to fine-tune on, the tokenizer, and a Hugging Face folder with random weights."""
    examples = [example.row() for example in worked_examples(1, 16_000, 1, families=TAUGHT)]
    write_jsonl(out / "sft.jsonl", examples)
    tok.train_tokenizer([m["content"] for row in examples for m in row["messages"]], 384, out / "tokenizer")
    size = tok.vocabulary_size(tok.load_tokenizer(out / "tokenizer"))
    architecture = dataclasses.replace(
        PRESETS["tiny"],
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        head_dim=32, vocab_size=-(-size // 128) * 128, max_position_embeddings=1024, bos_token_id=None,
        eos_token_ids=(), rope_theta=10_000.0,
    )  # fmt: skip
    with torch.device("meta"):
        model = CausalLM(architecture)
    write_folder(out / "start", architecture.to_hf(), model.initial_values(1), dtype=torch.float32)
    tok.copy_tokenizer(out / "tokenizer", out / "start")


def fine_tuning(out: Path) -> SftConfig:
    table: dict[str, Any] = {
        "run": str(out / "sft"),
        "model": {"path": str(out / "start"), "dtype": "float32"},
        "fp8": {"recipe": "bf16"},
        "data": {"train": str(out / "sft.jsonl"), "max_length": 512, "max_tokens_per_gpu": 512},
        "optim": {"lr": 2e-3, "min_lr": 1e-4, "schedule": "cosine", "warmup_fraction": 0.05, "weight_decay": 0.0},
        "train": {"epochs": 1, "global_batch": 32, "eval_every": 0, "save_every": 100, "keep_checkpoints": 1},
        "log": {"tensorboard": False, "every": 10},
    }
    return SftConfig.model_validate(table)


def reinforcement(out: Path, precision: str, seed: int, stage: int, options: argparse.Namespace) -> RlConfig:
    name = f"{precision}-seed{seed}-stage"
    table: dict[str, Any] = {
        "run": str(out / f"{name}{stage}"),
        "init": {"checkpoint": str(options.start if stage == 1 else out / f"{name}1")},
        "model": {"dtype": "float32"},
        "fp8": {"recipe": precision, "health_every": 0},
        "data": {
            "train": str(out / f"train{stage}.jsonl"),
            "validation": str(out / f"held_out{stage}.jsonl"),
            "max_prompt_tokens": 200,
            "max_tokens_per_gpu": 512,
        },
        "rollout": {
            "prompts": options.prompts,
            "samples": 8,
            "max_new_tokens": (128, 256)[stage - 1],
            "temperature": (1.0, 1.1)[stage - 1],
            "oversample": options.oversample,
            "cache_tokens": 65_536,
            "max_sequences": 128,
            "max_batch_tokens": 1024,
        },
        "reward": {"kind": "reasoning_gym", "workers": 1},
        "eval": {"samples": 4, "temperature": 1.0},
        "optim": {"lr": options.lr, "schedule": "constant", "betas": (0.9, 0.98)},
        "train": {
            "steps": options.steps,
            "global_batch": 8 * options.prompts,
            "seed": seed,
            "eval_every": options.steps,
            "eval_sequences": options.questions,
            "save_every": 10,
            "keep_checkpoints": 1,
        },
        "log": {"tensorboard": False},
    }
    return RlConfig.model_validate(table)


def result_of(run: Path) -> dict[str, Any]:
    """What a stage did, from its metrics."""
    lines = read_metrics(run / "metrics.jsonl")
    steps = [line for line in lines if line["kind"] == "train"]
    held_out = {line["step"]: line["eval_reward"] for line in lines if line["kind"] == "eval"}
    rewards = [step["reward"] for step in steps]
    return {
        "held_out_before": held_out[0],
        "held_out_after": held_out[max(held_out)],
        "reward_first_5": statistics.fmean(rewards[:5]),
        "reward_last_5": statistics.fmean(rewards[-5:]),
        "rewards": [round(reward, 4) for reward in rewards],
        "entropy": [round(step["entropy"], 4) for step in steps],
        "logprob_diff_mean": statistics.fmean(step["logprob_diff"] for step in steps),
        "token_mult_prob_error_max": max(step["token_mult_prob_error"] for step in steps),
        "importance_clipped_mean": statistics.fmean(step["importance_clipped"] for step in steps),
        "minutes": round((sum(s["step_time_s"] for s in steps) + sum(x.get("eval_s", 0) for x in lines)) / 60, 2),
        "phase_seconds": {
            name: round(sum(step[name] for step in steps), 1)
            for name in ("rollout_s", "reward_s", "logprob_s", "update_s", "sync_s")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="a fine-tuning run to start from, instead of making one")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--oversample", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--questions", type=int, default=96, help="held-out questions")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    if not (options.out / "train1.jsonl").exists():
        write_prompts(options.out)
    if options.start is None:
        options.start = options.out / "sft"
        if not (options.out / "start").exists():
            write_start(options.out)
        assert train_sft(fine_tuning(options.out), WORLD) is None, "stopped on request; run the same command to go on"
    runs: dict[tuple[int, str], dict[str, Any]] = {}
    for seed, stage, precision in product(options.seeds, (1, 2), options.precision):
        config = reinforcement(options.out, precision, seed, stage, options)
        assert train_rl(config, WORLD) is None, "stopped on request; run the same command to go on"
        run = runs.setdefault((seed, precision), {"precision": PRECISIONS[precision], "seed": seed})
        run[f"stage{stage}"] = result_of(Path(config.run))
        if options.json:
            settings = {k: v for k, v in vars(options).items() if k not in ("out", "json", "start")}
            record = {**environment(), "settings": settings, "families": FAMILIES, "runs": list(runs.values())}
            options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
