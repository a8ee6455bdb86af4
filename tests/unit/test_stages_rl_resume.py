"""`infir2 rl` stopped and started again: the bits of a run left alone, and the same reference for the KL term."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_rl
from small_rl import rl
from small_run import metrics_lines

from infir2.checkpoint import manifest
from infir2.rl import loop, samples
from infir2.rl.collect import Collector
from infir2.rl.samples import read_samples
from infir2.rollout.engine import Engine

Recipe = Callable[..., tuple[Path, Path]]
TIMES = {"time", "step_time_s", "tokens_per_s", "rollout_tokens_per_s"}


def numbers(run: Path) -> list[dict[str, Any]]:
    """Every line of numbers without what a clock says: JSON keeps every bit of a float."""
    lines = metrics_lines(run) + metrics_lines(run, "eval")
    lines.sort(key=lambda line: (line["step"], line["kind"] != "train"))
    return [{k: v for k, v in line.items() if k not in TIMES and not k.endswith("_s")} for line in lines]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"fp8.recipe": "blockwise", "model.dtype": "bfloat16"},
        {"train.global_batch": 16, "policy.kl_coef": 0.01, "policy.importance": "sequence"},
    ],
    ids=["float32", "fp8", "two updates a rollout, with reference"],
)
def test_a_resumed_run_has_the_bits_of_one_left_alone(rl_recipe: Recipe, settings: dict[str, Any]) -> None:
    """Rewards, lengths, losses, log-probabilities: samples and weights are the same after a resume."""
    settings = {"train.steps": 6} | settings
    whole_path, whole = rl_recipe("whole", **settings)
    assert rl(whole_path) == 0
    path, run = rl_recipe("parts", **settings)
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
    rl_recipe: Recipe, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"train.steps": 4, "train.save_every": 0, "train.global_batch": 16, "train.eval_every": 0}
    whole_path, whole = rl_recipe("whole", **settings)
    assert rl(whole_path) == 0
    path, run = rl_recipe("stopped", **settings)
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
    rl_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"train.steps": 4, "train.eval_every": 2, "train.save_every": 0}
    whole_path, whole = rl_recipe("whole", **settings)
    assert rl(whole_path) == 0
    path, run = rl_recipe("stopped", **settings)
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


def test_the_last_evaluation_is_not_given_up(rl_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    path, run = rl_recipe(**{"train.steps": 4, "train.eval_every": 2, "train.save_every": 0})
    signal_in_evaluation(monkeypatch, 2)
    assert rl(path) == 0
    assert [line["step"] for line in metrics_lines(run, "eval")] == [0, 2, 4]


def test_the_reference_stays_what_the_run_started_from(
    rl_recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """init.checkpoint names a run folder, and that run goes on between start and resume."""
    before = {"train.eval_every": 0, "train.steps": 2}
    assert rl(rl_recipe("before", **before)[0]) == 0
    settings = {"init.checkpoint": str(tmp_path / "before"), "model.path": None}
    settings |= {"policy.kl_coef": 0.1, "train.steps": 4}
    whole_path, whole = rl_recipe("whole", **settings)
    assert rl(whole_path) == 0
    path, run = rl_recipe("parts", **settings)
    assert rl(path, "--train.steps", "2") == 0
    first = tmp_path / "before/checkpoints/step-000002"
    assert json.loads((run / "reference.json").read_text())["path"] == str(first)
    assert rl(rl_recipe("before", **before | {"train.steps": 4, "train.keep_checkpoints": 0})[0]) == 0
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
    rl_recipe: Recipe, policy: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "policy"
    shutil.copytree(policy, folder)
    settings = {"model.path": str(folder), "policy.kl_coef": 0.1, "train.eval_every": 0, "train.save_every": 1}
    path, run = rl_recipe(**settings)
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


def test_a_changed_grader_is_noticed(rl_recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    grader = tmp_path / "grader.py"
    grader.write_text("def score(response, label):\n    return float(label in response)\n")
    settings = {"reward.kind": "python", "reward.file": str(grader), "train.eval_every": 0, "train.save_every": 1}
    path, run = rl_recipe(**settings)
    assert rl(path, "--train.steps", "1") == 0
    moved = grader.rename(tmp_path / "moved.py")
    again = ("--train.steps", "2", "--reward.file", str(moved))
    moved.write_text(f"{moved.read_text()}# no more\n")
    capsys.readouterr()
    assert rl(path, *again) == 2
    assert f"was made with another recipe: reward.file: {moved} (SHA-256 " in capsys.readouterr().err
    moved.write_text(moved.read_text().removesuffix("# no more\n"))
    assert rl(path, *again) == 0, "the same file in another place"
    moved.write_text(f"{moved.read_text()}# no more\n")
    accepted = ("--train.steps", "3", "--reward.file", str(moved), "--train.accept_changes", "true")
    assert rl(path, *accepted) == 0
    assert any("SHA-256" in line.get("change", "") for line in metrics_lines(run, "event"))
    assert rl(path, *accepted[:-2], "--train.steps", "4") == 0, "what was accepted stands in the next checkpoint"


def test_a_checkpoint_comes_onto_the_disk_after_its_lines(rl_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that loses its power keeps what was fsynced; a resume does not write lines of earlier steps again."""
    path, run = rl_recipe(**{"train.steps": 4})
    names, durable, published = ("metrics.jsonl", "samples.jsonl"), {}, []
    true_sync, true_publish = os.fsync, manifest.publish

    def fsync(handle: int) -> None:
        true_sync(handle)
        durable[Path(os.readlink(f"/proc/self/fd/{handle}"))] = os.fstat(handle).st_size

    def publish(temporary: Path, final: Path) -> None:
        step = int(final.name.removeprefix("step-"))
        for name in names:
            lines = (run / name).read_bytes()[: durable[run / name]].splitlines()
            published.append((step, name, max(json.loads(line)["step"] for line in lines)))
        true_publish(temporary, final)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(manifest, "publish", publish)
    assert rl(path) == 0
    assert published == [(step, name, step) for step in (2, 4) for name in names]


@pytest.mark.parametrize("end", [b'{"step"', bytes(9), bytes(9) + b"\n", b'{"step"\n'])
def test_what_a_crash_leaves_at_the_end_of_the_completions(tmp_path: Path, end: bytes) -> None:
    whole = json.dumps(dict.fromkeys(samples._KEYS, 1)).encode() + b"\n"
    (tmp_path / "samples.jsonl").write_bytes(2 * whole + end)
    assert len(read_samples(tmp_path)) == 2
