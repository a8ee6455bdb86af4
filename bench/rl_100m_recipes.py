"""The recipes that bench/rl_100m.py runs, of its options."""

import argparse
from pathlib import Path
from typing import Any

from infir2.config import RlConfig, SftConfig


def fine_tuning(options: argparse.Namespace) -> SftConfig:
    out = options.out
    table: dict[str, Any] = {
        "run": str(out / "sft"),
        "model": {"preset": options.preset, "dtype": options.dtype},
        "fp8": {"recipe": "blockwise", "health_every": 0},
        "data": {
            "train": str(out / "lessons.jsonl"),
            "tokenizer": str(out / "tokenizer"),
            "max_length": 512,
            "max_tokens_per_gpu": options.batch_tokens,
        },
        "optim": {
            "lr": options.sft_lr,
            "min_lr": options.sft_lr / 20,
            "schedule": "cosine",
            "warmup_fraction": 0.05,
            "betas": (0.9, 0.98),
            "weight_decay": 0.01,
        },
        "train": {
            "epochs": options.epochs,
            "global_batch": options.sft_batch,
            "seed": options.seed,
            "eval_every": 200,
            "eval_sequences": 256,
            "save_every": 0,
        },
        "log": {"tensorboard": False, "every": 10},
    }
    return SftConfig.model_validate(table)


def practice(options: argparse.Namespace, precision: str, start: Path, run: Path) -> RlConfig:
    out = options.out
    longest = 64 + options.new_tokens
    at_once = min(1024, max(options.prompts * options.samples, 64))
    table: dict[str, Any] = {
        "run": str(run),
        "init": {"checkpoint": str(start)},
        "model": {"dtype": options.dtype},
        "fp8": {"recipe": precision, "health_every": 0},
        "data": {
            "train": str(out / "practice.jsonl"),
            "validation": str(out / "exam.jsonl"),
            "max_prompt_tokens": 64,
            "max_tokens_per_gpu": options.batch_tokens,
        },
        "rollout": {
            "prompts": options.prompts,
            "samples": options.samples,
            "max_new_tokens": options.new_tokens,
            "temperature": 1.0,
            "oversample": 1,  # groups without spread are left out, not replaced: a step takes the time of one rollout
            "cache_tokens": longest * at_once + 4096,
            "max_sequences": at_once,
            "max_batch_tokens": max(8192, at_once),
        },
        "reward": {"kind": "reasoning_gym"},
        "eval": {"samples": 1, "temperature": 1.0},
        "optim": {
            "lr": options.lr,
            "schedule": "wsd",
            "warmup_steps": min(5, options.steps),
            "betas": (0.9, 0.98),
            "weight_decay": 0.0,
        },
        "train": {
            "steps": options.steps,
            "global_batch": options.prompts * options.samples,
            "seed": options.seed,
            "eval_every": options.eval_every,
            "eval_sequences": options.questions,
            "save_every": 0,
        },
        "log": {"tensorboard": False},
    }
    return RlConfig.model_validate(table)
