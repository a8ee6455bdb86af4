"""Reinforcement learning in two torchrun processes of which one fails: both end for it, and it is told in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import small_rl
from small_torchrun import together

Outcomes = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Of each rank, by the failure's name. The policy has learnt nothing: no group has spread."""
    out = tmp_path_factory.mktemp("out")
    policy = small_rl.write_policy(out / "policy" / "hf", steps=0)
    prompts = small_rl.write_prompts(out / "prompts.jsonl")
    settings = {"train.steps": 6, "train.global_batch": 16, "train.eval_every": 4, "rollout.max_new_tokens": 4}
    settings["policy.kl_coef"] = 0.01
    path = small_rl.write_rl_recipe(out / "run.toml", out / "run", policy, prompts, **settings)
    together(str(Path(__file__).with_name("failing_rl_worker.py")), str(path), str(out))
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("prompts", "data: the processes have read different prompts; give every host the same files"),
        ("reference", "the disk is full"),
        ("samples at the start", "the disk is full"),
        ("evaluation at the start", "the disk is full"),
        ("samples", "the disk is full"),
        ("samples of an evaluation", "the disk is full"),
        ("no spread", "the disk is full"),
        ("save", "step 2 could not be saved"),
    ],
)
def test_both_end_with_one_line(outcomes: Outcomes, failure: str, message: str) -> None:
    first, second = (of_rank[failure] for of_rank in outcomes)
    assert (first["code"], second["code"]) == (2, 2), first["err"] + second["err"]
    assert first["err"].endswith(f"infir2: error: {message}\n")
    assert "infir2: error" not in second["err"]


@pytest.mark.slow
def test_a_fault_of_the_program_tells_its_place(outcomes: Outcomes) -> None:
    first, second = (of_rank["reward"] for of_rank in outcomes)
    assert (first["code"], second["code"]) == (None, None)
    assert "ValueError: odd" in first["err"]
    assert "in reward_of_rank_1" in second["err"], second["err"]
