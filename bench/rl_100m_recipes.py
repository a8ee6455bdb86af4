"""The recipes that bench/rl_100m.py runs: the shipped ones of its size, with its options written over them."""

import argparse
from pathlib import Path

from record import shipped

from infir2.config import RlConfig, SftConfig

ALIKE = {"fp8.health_every": 0, "train.save_every": 0, "log.tensorboard": "false"}


def fine_tuning(options: argparse.Namespace) -> SftConfig:
    """From random weights, so with both stages' lessons at once."""
    out = options.out
    values = {
        "run": out / "sft",
        "init": "{}",
        "model": f'{{ preset = "{options.preset}", dtype = "{options.dtype}" }}',
        "data.train": out / "lessons.jsonl",
        "data.tokenizer": out / "tokenizer",
        # One micro-batch a step, which is filled up: as many tokens as the rows of a step have.
        "data.max_tokens_per_gpu": min(options.batch_tokens, 128 * options.sft_batch),
        "optim.lr": options.sft_lr,
        "optim.min_lr": options.sft_lr / 20,
        "train.epochs": options.epochs,
        "train.global_batch": options.sft_batch,
        "train.seed": options.seed,
        "train.eval_every": 200,
        "log.every": 10,
    }
    return shipped(SftConfig, "sft_small_stage2", {**ALIKE, **values})


def practice(options: argparse.Namespace, precision: str, start: Path, run: Path) -> RlConfig:
    """One step a rollout, whose kinds of questions may need longer answers than the recipe's."""
    out = options.out
    at_once = min(1024, max(options.prompts * options.samples, 64))
    values = {
        "run": run,
        "init.checkpoint": start,
        "model.dtype": options.dtype,
        "fp8.recipe": precision,
        "data.train": out / "practice.jsonl",
        "data.validation": out / "exam.jsonl",
        "data.max_tokens_per_gpu": options.batch_tokens,
        "rollout.prompts": options.prompts,
        "rollout.samples": options.samples,
        "rollout.max_new_tokens": options.new_tokens,
        "rollout.cache_tokens": (64 + options.new_tokens) * at_once + 4096,
        "rollout.max_sequences": at_once,
        "rollout.max_batch_tokens": max(8192, at_once),
        "eval.samples": 1,
        "optim.lr": options.lr,
        "optim.warmup_steps": min(5, options.steps),
        "train.steps": options.steps,
        "train.global_batch": options.prompts * options.samples,
        "train.seed": options.seed,
        "train.eval_every": options.eval_every,
        "train.eval_sequences": options.questions,
    }
    return shipped(RlConfig, "rl_small_stage1", {**ALIKE, **values})
