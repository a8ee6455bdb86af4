"""Reinforcement learning in two torchrun processes (gloo): the rollouts of one process, its steps but for the order of
sums, a signal, SIGKILL, and mistakes."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import small_rl
from small_run import metrics_lines
from small_torchrun import together, torchrun

from infir2.rl.samples import read_samples

SETTINGS: dict[str, Any] = {"train.steps": 6, "train.global_batch": 16, "train.eval_every": 4, "train.save_every": 2}
"""Two optimiser steps a rollout: the log-probabilities before the first are computed apart."""
OF_ROLLOUTS = ("reward", "accuracy", "response_length", "truncated", "sampled_groups", "kept_groups")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_rl.write_policy(tmp_path_factory.mktemp("policy") / "hf")


def recipe(tmp_path: Path, policy: Path, name: str, **settings: Any) -> tuple[Path, Path]:
    prompts = small_rl.write_prompts(tmp_path / "prompts.jsonl")
    path = small_rl.write_rl_recipe(tmp_path / f"{name}.toml", tmp_path / name, policy, prompts, **SETTINGS | settings)
    return path, tmp_path / name


def course(run: Path, *keys: str) -> list[tuple[Any, ...]]:
    """Values of the lines in which the first key is."""
    lines = sorted(metrics_lines(run) + metrics_lines(run, "eval"), key=lambda line: (line["step"], line["kind"]))
    return [(line["step"], *(line.get(key) for key in keys)) for line in lines if keys[0] in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        # So few samples that one process has no micro-batch of its own in some steps.
        {"data.max_tokens_per_gpu": 2048, "policy.importance": "sequence", "policy.kl_coef": 0.01},
    ],
)
def test_two_processes_learn_like_one(tmp_path: Path, policy: Path, settings: dict[str, Any]) -> None:
    path, alone = recipe(tmp_path, policy, "alone", **settings)
    assert small_rl.rl(path) == 0
    path, shared = recipe(tmp_path, policy, "shared", **settings)
    together("-m", "infir2", "rl", str(path))
    for keys in (OF_ROLLOUTS, ("eval_reward", "eval_response_length")):
        assert course(shared, *keys) == course(alone, *keys), "the same samples, whoever drew them"
    assert read_samples(shared) == read_samples(alone)
    names = ("loss", "grad_norm", "entropy", "update_kl", "logprob_diff", "valid_tokens")
    pairs = list(zip(course(shared, *names), course(alone, *names), strict=True))
    assert len(pairs) == 6
    for together_, one in pairs:
        assert together_ == pytest.approx(one, rel=1e-4, abs=1e-6)
    assert [line["event"] for line in metrics_lines(shared, "event")].count("checkpoint") == 3


@pytest.mark.slow
def test_killed_and_resumed_with_the_same_bits(tmp_path: Path, policy: Path) -> None:
    """One process gets SIGTERM while both sample: both stop, and save. Then SIGKILL; the end is that of a whole run."""
    path, whole = recipe(tmp_path, policy, "whole")
    together("-m", "infir2", "rl", str(path))
    path, run = recipe(tmp_path, policy, "killed")
    process = torchrun("-m", "infir2", "rl", str(path), start_new_session=True)
    wait_for(process, lambda: len(metrics_lines(run)) >= 1)
    (child, *_) = children(process.pid)
    os.kill(child, signal.SIGTERM)
    process.communicate(timeout=120)
    assert [line["event"] for line in metrics_lines(run, "event")].count("stopped") == 1
    assert metrics_lines(run)[-1]["step"] % 2 == 0, "between two rollouts"

    process = torchrun("-m", "infir2", "rl", str(path), start_new_session=True)
    before = len(metrics_lines(run))
    wait_for(process, lambda: len(metrics_lines(run)) > before)
    for pid in (*children(process.pid), process.pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=120)
    assert metrics_lines(run)[-1]["step"] < 6

    together("-m", "infir2", "rl", str(path))
    names = ("loss", "grad_norm", *OF_ROLLOUTS)
    assert course(run, *names) == course(whole, *names)
    assert course(run, "eval_reward") == course(whole, "eval_reward")
    assert read_samples(run) == read_samples(whole)


def wait_for(process: Any, done: Any) -> None:
    limit = time.monotonic() + 90
    while time.monotonic() < limit:
        assert process.poll() is None, process.communicate()
        try:
            if done():
                return
        except FileNotFoundError:
            pass
        time.sleep(0.02)
    raise AssertionError("nothing has happened")


def children(pid: int) -> list[int]:
    """Processes that torchrun started, which have sessions of their own."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid:
            found.append(int(entry.parent.name))
    return found


@pytest.mark.slow
def test_shards_are_refused(tmp_path: Path, policy: Path) -> None:
    path, run = recipe(tmp_path, policy, "run")
    process = torchrun("-m", "infir2", "rl", str(path), "--parallel.replicate", "3")
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0
    message = "parallel.replicate (3): infir2 rl holds the whole model in each of its 2 process(es); leave it out"
    assert err.count(f"infir2: error: {message}\n") == 1, out + err
    assert not run.exists()
