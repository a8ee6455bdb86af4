"""Reinforcement learning killed at random moments: rewards, lengths, losses and completions are those of a run that was
left alone, to the last bit, wherever the kill hit: sampling, scoring, training or saving."""

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import small_rl
from killable import start
from small_run import metrics_lines

from infir2.rl.samples import read_samples

KILLS, STEPS = 8, 12
SETTINGS: dict[str, Any] = {
    "fp8.recipe": "blockwise",
    "model.dtype": "bfloat16",
    "train.steps": STEPS,
    "train.global_batch": 16,  # two optimiser steps a rollout
    "train.save_every": 2,
    "train.eval_every": 6,
    "train.keep_checkpoints": 2,
}
COMPARED = ("loss", "grad_norm", "reward", "response_length", "entropy", "update_kl", "logprob_diff", "eval_reward")


def bits(run: Path) -> list[tuple[Any, ...]]:
    """What must not differ, of every whole line in the metrics."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    text = path.read_text()
    path.write_text(text[: text.rfind("\n") + 1])  # a kill may have torn the last line
    lines = metrics_lines(run) + metrics_lines(run, "eval")
    lines.sort(key=lambda line: (line["step"], line["kind"] != "train"))
    return [(line["step"], line["kind"], *(line.get(key) for key in COMPARED)) for line in lines]


def attempt(path: Path, run: Path, seconds: float | None = None) -> int | None:
    """Exit code of one start, which gets SIGKILL after ``seconds``; None where that came first."""
    process = start(path, run.with_suffix(".log"), "rl")
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
    return None if process.exitcode == -signal.SIGKILL else process.exitcode


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sigkills_leave_no_trace(tmp_path: Path) -> None:
    policy = small_rl.write_policy(tmp_path / "hf")
    prompts = small_rl.write_prompts(tmp_path / "prompts.jsonl")
    path, run = tmp_path / "whole.toml", tmp_path / "whole"
    small_rl.write_rl_recipe(path, run, policy, prompts, **SETTINGS)
    began = time.monotonic()
    assert attempt(path, run) == 0, run.with_suffix(".log").read_text()
    seconds = time.monotonic() - began
    expected, completions = bits(run), read_samples(run)
    assert [line[:2] for line in expected if line[1] == "train"] == [(step, "train") for step in range(1, STEPS + 1)]

    dice, kills, within, finished = random.Random(4), 0, 0, 0
    while kills < KILLS or not finished:
        path, run = tmp_path / f"killed-{finished}.toml", tmp_path / f"killed-{finished}"
        small_rl.write_rl_recipe(path, run, policy, prompts, **SETTINGS)
        code = attempt(path, run, dice.uniform(0.15, 0.6) * seconds if kills < KILLS else None)
        written = bits(run)
        assert written == expected[: len(written)], f"after {kills} kills"
        if code is None:
            kills += 1
            within += 1 < len(written) < len(expected)
            continue
        assert code == 0, run.with_suffix(".log").read_text()
        assert written == expected
        assert read_samples(run) == completions
        finished += 1
    print(f"{kills} kills, {within} of them between the first step and the last, {finished} runs finished")
    assert within >= KILLS // 3
