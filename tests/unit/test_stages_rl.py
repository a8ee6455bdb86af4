"""`infir2 rl` from its command line: reward rises, resumes are bit-identical, mistakes are explained."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_rl
from small_run import metrics_lines

from infir2 import cli
from infir2.config import RewardSection, RlConfig, load
from infir2.report import write_report
from infir2.reward.sandbox import sandbox_report
from infir2.rl.collect import Collector
from infir2.rl.samples import read_samples
from infir2.rollout.engine import Engine
from infir2.stages.rl import make_scorer

Recipe = Callable[..., tuple[Path, Path]]
TIMES = {"time", "step_time_s", "tokens_per_s", "rollout_tokens_per_s"}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_rl.write_policy(tmp_path_factory.mktemp("policy") / "hf")


@pytest.fixture
def recipe(tmp_path: Path, policy: Path) -> Recipe:
    prompts = small_rl.write_prompts(tmp_path / "prompts.jsonl")

    def write(name: str = "run", **overrides: Any) -> tuple[Path, Path]:
        run = tmp_path / name
        return small_rl.write_rl_recipe(tmp_path / f"{name}.toml", run, policy, prompts, **overrides), run

    return write


def rl(path: Path, *words: str) -> int:
    return cli.main(["rl", str(path), *words])


def numbers(run: Path) -> list[dict[str, Any]]:
    """Every line of numbers without what a clock says: JSON keeps every bit of a float."""
    lines = metrics_lines(run) + metrics_lines(run, "eval")
    lines.sort(key=lambda line: (line["step"], line["kind"] != "train"))
    return [{k: v for k, v in line.items() if k not in TIMES and not k.endswith("_s")} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "blockwise"])
def test_reward_rises(recipe: Recipe, precision: str) -> None:
    path, run = recipe(**{"train.steps": 12, "fp8.recipe": precision, "train.eval_every": 12, "train.save_every": 0,
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


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"fp8.recipe": "blockwise", "model.dtype": "bfloat16"},
        {"train.global_batch": 16, "policy.kl_coef": 0.01, "policy.importance": "sequence"},
    ],
    ids=["float32", "fp8", "two updates a rollout, with reference"],
)
def test_a_resumed_run_has_the_bits_of_one_left_alone(recipe: Recipe, settings: dict[str, Any]) -> None:
    """Rewards, lengths, losses, log-probabilities: samples and weights are the same after a resume."""
    settings = {"train.steps": 6} | settings
    whole_path, whole = recipe("whole", **settings)
    assert rl(whole_path) == 0
    path, run = recipe("parts", **settings)
    assert rl(path, "--train.steps", "2") == 0
    assert rl(path, "--train.steps", "4") == 0
    assert rl(path) == 0
    # Runs that end at another step evaluate and save there, too; with these intervals at the same steps.
    assert numbers(run) == numbers(whole)
    assert [line["event"] for line in metrics_lines(run, "event")].count("resume") == 2
    assert read_samples(run) == read_samples(whole)
    if "policy.kl_coef" in settings:
        steps = metrics_lines(run)
        assert steps[0]["reference_kl"] == 0
        assert steps[-1]["reference_kl"] > 0
        assert [step["update_kl"] > 0 for step in steps] == [False, True] * 3
        assert ["reward" in step for step in steps] == [True, False] * 3


@pytest.mark.parametrize("when", ["sampling", "training"])
def test_sigterm_drops_the_rollout_and_a_resume_makes_it_again(
    recipe: Recipe, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"train.steps": 4, "train.save_every": 0, "train.global_batch": 16, "train.eval_every": 0}
    whole_path, whole = recipe("whole", **settings)
    assert rl(whole_path) == 0
    path, run = recipe("stopped", **settings)
    steps = 0
    original = Engine.step

    def step_and_signal(self: Engine) -> Any:
        nonlocal steps
        steps += 1
        if steps == 60:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    if when == "sampling":
        monkeypatch.setattr(Engine, "step", step_and_signal)
    else:
        from infir2.rl import loop

        split = loop.split_samples

        def split_and_signal(samples: Any, parts: int) -> Any:
            nonlocal steps
            steps += 1
            if steps == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return split(samples, parts)

        monkeypatch.setattr(loop, "split_samples", split_and_signal)
    assert rl(path) == 128 + signal.SIGTERM
    monkeypatch.undo()
    stopped = metrics_lines(run, "event")[-1]
    assert (stopped["event"], stopped["step"]) == ("stopped", 2), "between two rollouts"
    assert rl(path) == 0
    assert numbers(run) == numbers(whole)
    assert read_samples(run) == read_samples(whole)


def signal_in_evaluation(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """SIGTERM when evaluation ``number`` (from 0) begins to sample."""
    collect, seen = Collector.sample, []

    def sample_and_signal(self: Collector, rows: Any, params: Any, stream: str, *rest: Any) -> Any:
        if stream == "eval":
            seen.append(stream)
            if len(seen) == number + 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return collect(self, rows, params, stream, *rest)

    monkeypatch.setattr(Collector, "sample", sample_and_signal)


def test_sigterm_gives_up_an_evaluation_and_a_resume_makes_it_again(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"train.steps": 4, "train.eval_every": 2, "train.save_every": 0}
    whole_path, whole = recipe("whole", **settings)
    assert rl(whole_path) == 0
    path, run = recipe("stopped", **settings)
    signal_in_evaluation(monkeypatch, 1)
    assert rl(path) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert [line["step"] for line in metrics_lines(run, "eval")] == [0]
    assert metrics_lines(run, "event")[-1]["step"] == 2
    assert (run / "checkpoints/step-000002").is_dir(), "the step before it is not given up"
    # As a kill leaves it after the evaluation's samples and before its line.
    shown = [line for line in read_samples(whole) if (line["step"], line["kind"]) == (2, "eval")]
    with open(run / "samples.jsonl", "a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in shown))
    assert rl(path) == 0
    assert numbers(run) == numbers(whole)
    assert read_samples(run) == read_samples(whole)


def test_the_last_evaluation_is_not_given_up(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    path, run = recipe(**{"train.steps": 4, "train.eval_every": 2, "train.save_every": 0})
    signal_in_evaluation(monkeypatch, 2)
    assert rl(path) == 0
    assert [line["step"] for line in metrics_lines(run, "eval")] == [0, 2, 4]


def test_stage_two_starts_from_stage_one(recipe: Recipe) -> None:
    one_path, one = recipe("one", **{"train.steps": 2})
    assert rl(one_path) == 0
    two_path, two = recipe("two", **{"train.steps": 2, "init.checkpoint": str(one), "rollout.temperature": 1.1,
                                     "rollout.max_new_tokens": 24})  # fmt: skip
    text = two_path.read_text().replace(load(RlConfig, two_path).model.path or "", "")
    two_path.write_text(text.replace('path = ""\n', ""))
    assert rl(two_path) == 0
    (start,) = [line for line in metrics_lines(two, "event") if line["event"] == "init"]
    assert start["from"] == str(one / "checkpoints/step-000002")
    assert all(step["logprob_diff"] < 1e-5 for step in metrics_lines(two)), "the trainer knows the temperature"


def without_model(path: Path) -> Path:
    """The recipe starts from init.checkpoint alone."""
    lines = path.read_text().splitlines()
    path.write_text("".join(f"{line}\n" for line in lines if not line.startswith("path = ")))
    return path


def test_the_reference_stays_what_the_run_started_from(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """init.checkpoint names a run folder, and that run goes on between start and resume."""
    before = {"train.eval_every": 0, "train.steps": 2}
    assert rl(recipe("before", **before)[0]) == 0
    settings = {"init.checkpoint": str(tmp_path / "before"), "policy.kl_coef": 0.1, "train.steps": 4}
    whole_path, whole = recipe("whole", **settings)
    assert rl(without_model(whole_path)) == 0
    path, run = recipe("parts", **settings)
    assert rl(without_model(path), "--train.steps", "2") == 0
    first = tmp_path / "before/checkpoints/step-000002"
    assert json.loads((run / "reference.json").read_text())["path"] == str(first)
    assert rl(recipe("before", **before | {"train.steps": 4, "train.keep_checkpoints": 0})[0]) == 0
    assert rl(path) == 0
    assert numbers(run) == numbers(whole)
    assert [line["from"] for line in metrics_lines(run, "event") if line["event"] == "reference"] == [str(first)]

    capsys.readouterr()
    for newer, message in (
        (lambda: first.rename(tmp_path / "kept"), f"{first}: the weights that the KL term of {run} refers to are gone"),
        (lambda: (tmp_path / "before/checkpoints/step-000004").rename(first), f"{first}: not the weights that the KL"),
    ):
        newer()
        assert rl(path, "--train.steps", "6") == 2
        assert message in capsys.readouterr().err
    other = ("--train.steps", "6", "--init.checkpoint", str(tmp_path / "kept"))
    assert rl(path, *other) == 2
    assert f"another recipe: init.checkpoint: {tmp_path / 'before'} -> {tmp_path / 'kept'}" in capsys.readouterr().err
    assert rl(path, *other, "--train.accept_changes", "true") == 0
    assert json.loads((run / "reference.json").read_text())["path"] == str(tmp_path / "kept")


def test_a_changed_model_folder_is_no_reference(
    recipe: Recipe, policy: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "policy"
    shutil.copytree(policy, folder)
    settings = {"model.path": str(folder), "policy.kl_coef": 0.1, "train.eval_every": 0, "train.save_every": 1}
    path, run = recipe(**settings)
    assert rl(path, "--train.steps", "1") == 0
    (run / "reference.json").rename(tmp_path / "reference.json")
    assert rl(path, "--train.steps", "2") == 2
    assert "reference.json: does not say which weights the KL term has referred to" in capsys.readouterr().err
    (tmp_path / "reference.json").rename(run / "reference.json")
    assert rl(path, "--train.steps", "2") == 0
    small_rl.write_policy(tmp_path / "other/hf", steps=1)
    shutil.copy(tmp_path / "other/hf/model.safetensors", folder / "model.safetensors")
    assert rl(path, "--train.steps", "3") == 2
    assert f"{folder}: not the weights that the KL term of {run} has referred to" in capsys.readouterr().err
    assert rl(path, "--train.steps", "3", "--model.path", str(policy)) == 2
    assert "another recipe: model.path" in capsys.readouterr().err


def test_mismatch_raises_an_alarm(recipe: Recipe) -> None:
    path, run = recipe(**{"train.steps": 2, "fp8.recipe": "blockwise", "model.dtype": "bfloat16",
                          "policy.mismatch_limit": 1.0000001})  # fmt: skip
    assert rl(path) == 0
    alarms = [line for line in metrics_lines(run, "event") if line["event"] == "mismatch"]
    assert alarms
    assert alarms[0]["token_mult_prob_error"] > alarms[0]["limit"]


def test_steps_without_a_line_raise_alarms_and_lose_no_rollout(recipe: Recipe) -> None:
    settings = {"train.steps": 8, "train.global_batch": 8, "train.save_every": 4, "train.eval_every": 0,
                "policy.mismatch_limit": 1.0000000001}  # fmt: skip
    runs = []
    for every in (1, 6):
        path, run = recipe(f"every-{every}", **settings, **{"log.every": every})
        assert rl(path) == 0
        runs.append(run)
    alarms = [[line["step"] for line in metrics_lines(run, "event") if line["event"] == "mismatch"] for run in runs]
    assert alarms[0] == alarms[1] != []
    all_lines, few = metrics_lines(runs[0]), metrics_lines(runs[1])
    assert [line["step"] for line in few] == [6, 8]
    assert [line["step"] for line in all_lines if "reward" in line] == [1, 5]
    assert [line.get("reward") for line in few] == [all_lines[4]["reward"], None]
    assert few[0]["response_length"] == all_lines[4]["response_length"]


def test_wrong_answers_of_different_length_are_no_spread(recipe: Recipe, tmp_path: Path) -> None:
    wrong = small_rl.write_prompts(tmp_path / "wrong.jsonl", label="1234")
    path, run = recipe(**{"train.steps": 1, "train.eval_every": 0, "train.save_every": 0, "data.train": str(wrong),
                          "reward.overlong_buffer": 16, "rollout.temperature": 2.0})  # fmt: skip
    assert rl(path) == 0
    (step,) = metrics_lines(run)
    assert step["accuracy"] == 0
    assert step["reward"] < 0
    assert (step["groups_with_spread"], step["sampled_groups"], step["kept_groups"]) == (0, 12, 1)
    assert [line["event"] for line in metrics_lines(run, "event")].count("no_spread") == 1


def test_the_report_shows_reward_and_completions(recipe: Recipe, tmp_path: Path) -> None:
    path, run = recipe(**{"train.steps": 4})
    assert rl(path) == 0
    write_report([run], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    for words in ("Reward", "Response length", "Held-out reward", "Completions", "Answer: "):
        assert words in html, words


def test_dry_run_reads_the_prompts_and_writes_nothing(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    path, run = recipe()
    assert rl(path, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "train: 40 prompts of 40 rows" in shown
    assert "engine's cache of 4,096 tokens" in shown
    assert not run.exists()


def test_a_dry_run_tells_all_that_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = Path(__file__).parents[2] / "recipes"
    monkeypatch.chdir(tmp_path)
    words = ("--data.train", "gone.jsonl", "--data.validation", "away.jsonl", "--dry-run")
    for command, start in (("rl", "--model.path"), ("sft", "--model.path"), ("rl", "--init.checkpoint")):
        place = "models/Qwen2.5-1.5B"
        rest = (start, place) if start == "--init.checkpoint" else (start, place, "--init.checkpoint", "null")
        assert cli.main([command, str(recipes / f"{command}_1.5b_stage1.toml"), *rest, *words]) == 2
        told = capsys.readouterr()
        assert ("parameters: 1,543,714,304" in told.out) == (start == "--model.path")
        assert f'run = "runs/{command}_1.5b_stage1"' in told.out
        train, held_out, model = told.err.splitlines()
        assert train == "infir2: error: data.train: gone.jsonl: no such file or folder"
        assert held_out == "infir2: error: data.validation: away.jsonl: no such file or folder"
        assert model.startswith(f"infir2: error: {place}: no ")
    assert not any(tmp_path.iterdir())


def test_dry_run_foretells_the_cache_in_the_models_dtype(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    policy, tokens = small_rl.POLICY, 1 << 20
    shape = (policy.num_hidden_layers, policy.num_key_value_heads, policy.head_dim)
    for dtype, size in (("float32", 4 * shape[2]), ("bfloat16", 2 * shape[2])):
        path, _ = recipe(**{"rollout.cache_tokens": tokens, "model.dtype": dtype})
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
    recipe: Recipe, overrides: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    path, run = recipe(**overrides)
    for words in (["--dry-run"], []):
        assert rl(path, *words) == 2
        assert re.search(message, capsys.readouterr().err)
    assert not (run / "checkpoints").exists()


def test_a_cache_of_one_longest_sample_suffices(recipe: Recipe) -> None:
    """Without evaluations nobody needs room for their responses."""
    path, run = recipe(**{"rollout.cache_tokens": 64, "eval.max_new_tokens": 400, "train.eval_every": 0,
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
    if kind == "code" and not all(layer.works for layer in sandbox_report()):
        pytest.skip("no safe sandbox on this machine")
    scorer = make_scorer(RewardSection(kind=kind, think="required", workers=1))
    pairs = [(f"<think>?</think>{right}", label), (right, label), ("", label)]
    assert [score.value for score in scorer.score_many(pairs)] == [1, 0, 0], "without </think> nothing is paid"
    scorer.close()


def test_torchrun_is_refused(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import contextlib

    from infir2.parallel import runtime

    path, _ = recipe()
    two = runtime.World(0, 2, small_rl.WORLD.device, None)
    monkeypatch.setattr(runtime, "world", lambda replicate: contextlib.nullcontext(two))
    assert rl(path) == 2
    assert "start it without torchrun" in capsys.readouterr().err


def test_prompts_with_messages_and_examples_of_the_house(tmp_path: Path) -> None:
    """`infir2 examples --form prompts` writes what `infir2 rl` reads with reasoning_gym rewards."""
    out = tmp_path / "stage1.jsonl"
    words = ["examples", str(out), "--form", "prompts", "--count", "6", "--families", "gcd", "letter_counting"]
    assert cli.main(words) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [set(row) for row in rows] == [{"prompt", "label", "family"}] * 6

    from infir2.data.worked_solutions import worked_examples
    from infir2.reward.dispatch import reward_for

    scorer = reward_for("reasoning_gym", workers=1)
    right = [
        (e.completion, row["label"])
        for e, row in zip(worked_examples(1, 6, 1, families=["gcd", "letter_counting"]), rows)
    ]
    wrong = [("\\boxed{-1}", row["label"]) for row in rows]
    scores = scorer.score_many(right + wrong)
    scorer.close()
    assert [score.value for score in scores] == [1.0] * 6 + [0.0] * 6
