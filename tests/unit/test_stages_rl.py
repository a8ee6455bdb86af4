"""`infir2 rl` from its command line: reward rises, alarms, what a stage starts from, dry runs, mistakes."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_rl
from small_rl import rl
from small_run import metrics_lines

from infir2 import cli
from infir2.config import RewardSection, RlConfig, load
from infir2.data.worked_solutions import worked_examples
from infir2.report import write_report
from infir2.reward import sandbox
from infir2.reward.dispatch import reward_for
from infir2.rl.samples import read_samples
from infir2.stages.rl import make_scorer

Recipe = Callable[..., tuple[Path, Path]]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "blockwise"])
def test_reward_rises(rl_recipe: Recipe, precision: str) -> None:
    path, run = rl_recipe(**{"train.steps": 12, "fp8.recipe": precision, "train.eval_every": 12, "train.save_every": 0,
                          "optim.lr": 2e-3})  # fmt: skip
    assert rl(path) == 0
    steps = metrics_lines(run)
    assert steps[0]["reward"] < 0.3
    assert sum(step["reward"] for step in steps[-3:]) / 3 > steps[0]["reward"] + 0.3
    assert metrics_lines(run, "eval")[-1]["eval_reward"] == 1
    for step in steps:
        assert step["update_kl"] == step["clip_low"] == step["clip_high"] == 0, "one update a rollout is on-policy"
        assert step["logprob_diff"] < (1e-5 if precision == "bf16" else 5e-3)
        assert step["version_lag"] == 0
        assert step["kept_groups"] <= 4
        assert step["sampled_groups"] <= 12
        assert {"rollout_s", "reward_s", "logprob_s", "update_s", "sync_s", "entropy", "truncated"} <= step.keys()
    samples = read_samples(run)
    assert {sample["step"] for sample in samples if sample["kind"] == "train"} == set(range(1, 13))
    assert [s["version"] for s in samples if s["step"] == 5] == [4, 4]
    assert (run / "tokenizer/chat_template.jinja").exists()


def test_stage_two_starts_from_stage_one(rl_recipe: Recipe) -> None:
    one_path, one = rl_recipe("one", **{"train.steps": 2})
    assert rl(one_path) == 0
    two_path, two = rl_recipe("two", **{"train.steps": 2, "init.checkpoint": str(one), "model.path": None,
                                        "rollout.temperature": 1.1, "rollout.max_new_tokens": 24})  # fmt: skip
    assert rl(two_path) == 0
    (start,) = [line for line in metrics_lines(two, "event") if line["event"] == "init"]
    assert start["from"] == str(one / "checkpoints/step-000002")
    assert all(step["logprob_diff"] < 1e-5 for step in metrics_lines(two)), "the trainer knows the temperature"


def test_mismatch_raises_an_alarm(rl_recipe: Recipe) -> None:
    path, run = rl_recipe(**{"train.steps": 2, "fp8.recipe": "blockwise", "model.dtype": "bfloat16",
                          "policy.mismatch_limit": 1.0000001})  # fmt: skip
    assert rl(path) == 0
    alarms = [line for line in metrics_lines(run, "event") if line["event"] == "mismatch"]
    assert alarms
    assert alarms[0]["token_mult_prob_error"] > alarms[0]["limit"]


def test_steps_without_a_line_raise_alarms_and_lose_no_rollout(rl_recipe: Recipe) -> None:
    settings = {"train.steps": 8, "train.global_batch": 8, "train.save_every": 4, "train.eval_every": 0,
                "policy.mismatch_limit": 1.0000000001}  # fmt: skip
    runs = []
    for every in (1, 6):
        path, run = rl_recipe(f"every-{every}", **settings, **{"log.every": every})
        assert rl(path) == 0
        runs.append(run)
    alarms = [[line["step"] for line in metrics_lines(run, "event") if line["event"] == "mismatch"] for run in runs]
    assert alarms[0] == alarms[1] != []
    all_lines, few = metrics_lines(runs[0]), metrics_lines(runs[1])
    assert [line["step"] for line in few] == [6, 8]
    assert [line["step"] for line in all_lines if "reward" in line] == [1, 5]
    assert [line.get("reward") for line in few] == [all_lines[4]["reward"], None]
    assert few[0]["response_length"] == all_lines[4]["response_length"]


def test_wrong_answers_of_different_length_are_no_spread(rl_recipe: Recipe, tmp_path: Path) -> None:
    wrong = small_rl.write_prompts(tmp_path / "wrong.jsonl", label="1234")
    path, run = rl_recipe(**{"train.steps": 1, "train.eval_every": 0, "train.save_every": 0, "data.train": str(wrong),
                          "reward.overlong_buffer": 16, "rollout.temperature": 2.0})  # fmt: skip
    assert rl(path) == 0
    (step,) = metrics_lines(run)
    assert step["accuracy"] == 0
    assert step["reward"] < 0
    assert (step["groups_with_spread"], step["sampled_groups"], step["kept_groups"]) == (0, 12, 1)
    assert [line["event"] for line in metrics_lines(run, "event")].count("no_spread") == 1


def test_the_report_shows_reward_and_completions(rl_recipe: Recipe, tmp_path: Path) -> None:
    path, run = rl_recipe(**{"train.steps": 4})
    assert rl(path) == 0
    write_report([run], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    for words in ("Reward", "Response length", "Held-out reward", "Completions", "Answer: "):
        assert words in html, words


def test_dry_run_reads_the_prompts_and_writes_nothing(rl_recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    path, run = rl_recipe()
    assert rl(path, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "train: 40 prompts of 40 rows" in shown
    assert "engine's cache of 4,096 tokens" in shown
    assert f"note: data.validation and data.train both read {run.parent}/prompts.jsonl: held-out results" in shown
    assert not run.exists()


def test_dry_run_tells_the_plan_where_programs_cannot_be_judged(
    rl_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sandbox, "sandbox_report", lambda: (sandbox.Layer("landlock", False, "no such kernel"),))
    path, _ = rl_recipe(**{"reward.kind": "code"})
    assert rl(path, "--dry-run") == 2
    told = capsys.readouterr()
    assert "this machine cannot run untrusted code safely (landlock: no such kernel)" in told.err
    assert "parameters: " in told.out


def test_dry_run_foretells_the_cache_in_the_models_dtype(rl_recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    policy, tokens = small_rl.POLICY, 1 << 20
    shape = (policy.num_hidden_layers, policy.num_key_value_heads, policy.head_dim)
    for dtype, size in (("float32", 4 * shape[2]), ("bfloat16", 2 * shape[2])):
        path, _ = rl_recipe(**{"rollout.cache_tokens": tokens, "model.dtype": dtype})
        assert rl(path, "--dry-run") == 0
        expected = 2 * shape[0] * shape[1] * size * tokens / 2**30
        assert f"engine's cache of {tokens:,} tokens: {expected:.2f} GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"train.global_batch": 24},
            r"rollout.prompts x rollout.samples \(32\) is not a multiple of train.global_batch",
        ),
        ({"train.global_batch": 16, "train.save_every": 3}, r"train.save_every \(3\) is not a multiple of the 2 steps"),
        ({"rollout.max_new_tokens": 300}, r"rollout.max_new_tokens \(348\) exceed data.max_tokens_per_gpu \(256\)"),
        ({"rollout.prompts": 80, "train.global_batch": 640}, "40 prompts are fewer than the 80 of one rollout"),
        ({"reward.kind": "choice"}, "bad_label"),
        ({"fp8.recipe": "blockwise", "fp8.head": True}, "fp8.head: the engine's log-probabilities come from a bf16"),
        ({"data.train": "nowhere.jsonl"}, "data.train: nowhere.jsonl: no such file or folder"),
        (
            {"rollout.cache_tokens": 79, "rollout.max_new_tokens": 32},
            r"rollout.max_new_tokens \(80\) exceed rollout.cache_tokens \(79, in whole blocks of 16\)",
        ),
        (
            {"rollout.cache_tokens": 95, "eval.max_new_tokens": 33},
            r"max_prompt_tokens \+ eval.max_new_tokens \(81\) exceed rollout.cache_tokens \(95, in whole blocks of 16",
        ),
        (
            {"eval.max_new_tokens": 209},
            r"data.max_prompt_tokens \+ eval.max_new_tokens: 257 tokens exceed the model's max_position_embeddings",
        ),
        ({"rollout.max_batch_tokens": 16}, r"rollout.max_sequences \(32\) is above rollout.max_batch_tokens \(16\)"),
        ({"rollout.temperature": 1e-6}, "rollout.temperature"),
        ({"rollout.temprature": 1}, "rollout.temprature: unknown key. Did you mean 'temperature'"),
    ],
)
def test_mistakes_are_explained(
    rl_recipe: Recipe, overrides: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run = rl_recipe(**overrides)
    for words in (["--dry-run"], []):
        assert rl(path, *words) == 2
        assert re.search(message, capsys.readouterr().err)
    assert not (run / "checkpoints").exists()


def test_a_cache_of_one_longest_sample_suffices(rl_recipe: Recipe) -> None:
    """Without evaluations nobody needs room for their responses."""
    path, run = rl_recipe(**{"rollout.cache_tokens": 64, "eval.max_new_tokens": 400, "train.eval_every": 0,
                          "train.steps": 1, "train.save_every": 0})  # fmt: skip
    assert load(RlConfig, path).longest_sample[0] == 64
    assert rl(path) == 0
    assert metrics_lines(run)[0]["sampled_groups"] >= 4


@pytest.mark.parametrize(
    ("kind", "label", "right"),
    [
        ("math", "34", "so \\boxed{34}"),
        ("choice", "B", "Answer: B"),
        ("code", '{"inputs": ["2"], "outputs": ["4"]}', "```python\nprint(int(input()) ** 2)\n```"),
    ],
)
def test_rewards_come_from_the_recipe(kind: Any, label: str, right: str) -> None:
    if kind == "code" and not all(layer.works for layer in sandbox.sandbox_report()):
        pytest.skip("no safe sandbox on this machine")
    scorer = make_scorer(RewardSection(kind=kind, think="required", workers=1))
    pairs = [(f"<think>?</think>{right}", label), (right, label), ("", label)]
    assert [score.value for score in scorer.score_many(pairs)] == [1, 0, 0], "without </think> nothing is paid"
    scorer.close()


def test_prompts_with_messages_and_examples_of_the_house(tmp_path: Path) -> None:
    """`infir2 examples --form prompts` writes what `infir2 rl` reads with reasoning_gym rewards."""
    out = tmp_path / "stage1.jsonl"
    words = ["examples", str(out), "--form", "prompts", "--count", "6", "--families", "gcd", "letter_counting"]
    assert cli.main(words) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [set(row) for row in rows] == [{"prompt", "label", "family"}] * 6

    scorer = reward_for("reasoning_gym", workers=1)
    right = [
        (e.completion, row["label"])
        for e, row in zip(worked_examples(1, 6, 1, families=["gcd", "letter_counting"]), rows)
    ]
    wrong = [("\\boxed{-1}", row["label"]) for row in rows]
    scores = scorer.score_many(right + wrong)
    scorer.close()
    assert [score.value for score in scores] == [1.0] * 6 + [0.0] * 6
