"""Figures against numbers computed by hand, tasks and their rows, and what of evalscope's world is kept out."""

import base64
import json
import math
import pickle
import re
import sys
import zlib
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infir2 import cli
from infir2.errors import ConfigError, DataError, UserError
from infir2.evaluate.evalscope_process import as_label
from infir2.evaluate.harness import Endpoint, Settings, find_evalscope, prepare, read_samples, run_benchmarks
from infir2.evaluate.local import run_local_task
from infir2.evaluate.local_data import stage, what_to_put
from infir2.evaluate.respond import Asked, Response, seed_of
from infir2.evaluate.score import Sample, mean_interval, paired, pass_at_k, sign_flip_p_value, summarise
from infir2.evaluate.server import LocalServer
from infir2.evaluate.stored_cases import stored_cases
from infir2.evaluate.tasks import BENCHMARKS, LocalTask, Sampling, parse_tasks, problems_of, with_sampling
from infir2.reward.code import judge, parse_problem
from infir2.reward.dispatch import reward_for
from infir2.reward.sandbox import Sandbox


def samples(scores: dict[str, list[float]], tokens: int = 10) -> list[Sample]:
    return [
        Sample(problem, index, score, tokens + index, index == 0, "text")
        for problem, found in scores.items()
        for index, score in enumerate(found)
    ]


# ---- figures


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample() -> None:
    for n, correct, k in ((5, 2, 1), (5, 2, 3), (6, 1, 2), (4, 4, 2), (4, 0, 4), (8, 3, 8)):
        right = [True] * correct + [False] * (n - correct)
        subsets = [s for s in product((0, 1), repeat=n) if sum(s) == k]
        share = sum(any(r for r, chosen in zip(right, s) if chosen) for s in subsets) / len(subsets)
        assert pass_at_k(n, correct, k) == pytest.approx(share)
    with pytest.raises(ValueError, match="pass@5"):
        pass_at_k(4, 1, 5)


def test_a_summary_by_hand() -> None:
    score = summarise(samples({"a": [1, 0, 0, 1], "b": [0, 0, 0, 0], "c": [1, 1, 1, 1]}))
    assert (score.problems, score.samples) == (3, 4)
    assert score.average == pytest.approx((0.5 + 0 + 1) / 3)
    assert score.pass_at == {1: pytest.approx(0.5), 2: pytest.approx((5 / 6 + 0 + 1) / 3), 4: pytest.approx(2 / 3)}
    assert (score.mean_tokens, score.median_tokens, score.truncated) == (11.5, 11.5, 0.25)
    assert 0 <= score.low < score.average < score.high <= 1
    uneven = summarise(samples({"a": [1, 0, 0], "b": [1]}))
    assert uneven.average == pytest.approx((1 / 3 + 1) / 2), "every problem weighs the same"
    assert uneven.pass_at == {1: pytest.approx(2 / 3)}
    with pytest.raises(DataError, match="no sample"):
        summarise([])


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    generator, covered = np.random.default_rng(1), 0
    for _ in range(60):
        chances = generator.beta(2, 3, 60)  # mean 0.4
        low, high = mean_interval(generator.binomial(8, chances) / 8)
        covered += low <= 0.4 <= high
    assert 52 <= covered <= 60, "95 % of 60 is 57"
    low, high = mean_interval(np.zeros(30))
    assert (low, 1 - high) == (0, pytest.approx(0.025 ** (1 / 30)))
    assert mean_interval(np.ones(30)) == (pytest.approx(1 - high), 1)


def test_the_paired_test_by_hand() -> None:
    """Three differences of 0.5, 0.25 and -0.25: of 8 assignments of signs, 4 have a sum at least 0.5 from 0."""
    first = samples({"a": [0, 0, 0, 0], "b": [1, 0, 0, 0], "c": [1, 1, 0, 0]})
    second = samples({"c": [1, 0, 0, 0], "a": [1, 1, 0, 0], "b": [1, 1, 0, 0]})
    pair = paired(first, second)
    assert (pair.problems, pair.better, pair.worse) == (3, 2, 1)
    assert pair.difference == pytest.approx(0.5 / 3)
    sums = [abs(0.5 * a + 0.25 * b - 0.25 * c) for a, b, c in product((-1, 1), repeat=3)]
    assert pair.p_value == pytest.approx(sum(s >= 0.5 - 1e-12 for s in sums) / 8)
    assert pair.low <= pair.difference <= pair.high
    same = paired(first, first)
    assert (same.difference, same.p_value, same.low, same.high) == (0, 1, 0, 0)
    with pytest.raises(DataError, match="not asked the same problems"):
        paired(first, samples({"a": [1]}))


def test_the_random_p_value_is_near_the_exact_one_and_uniform_without_a_difference() -> None:
    generator = np.random.default_rng(3)
    differences = generator.normal(0.3, 1, 16)
    exact = sign_flip_p_value(differences)
    padded = sign_flip_p_value(np.concatenate([differences, [0.0]]))  # 17 problems: sampled; a zero changes nothing
    assert padded == pytest.approx(exact, abs=0.02)
    values = [sign_flip_p_value(generator.normal(0, 1, 12)) for _ in range(200)]
    assert 2 <= sum(value <= 0.05 for value in values) <= 20
    assert abs(np.mean(values) - 0.5) < 0.07


# ---- tasks


def test_the_papers_settings_are_the_defaults() -> None:
    found = {name: (task.sampling.samples, task.sampling.max_tokens) for name, task in BENCHMARKS.items()}
    assert found == {
        "aime24": (32, 31_000), "aime25": (32, 31_000), "gpqa_diamond": (8, 26_000), "livecodebench_v5": (8, 27_000),
    }  # fmt: skip
    assert {(task.sampling.temperature, task.sampling.top_p) for task in BENCHMARKS.values()} == {(0.65, 0.95)}
    dates = BENCHMARKS["livecodebench_v5"].options["extra_params"]
    assert dates == {"start_date": "2024-08-01", "end_date": "2025-02-28"}


def test_tasks_on_the_command_line() -> None:
    found = parse_tasks("aime24, held_out_1,rg:gcd,choice:a.jsonl")
    assert [task.name for task in found] == ["aime24", "held_out_1", "rg:gcd", "choice:a.jsonl"]
    assert [task.grader for task in found[1:]] == ["reasoning_gym", "reasoning_gym", "choice"]
    changed = with_sampling(found[0], samples=2, temperature=0.0)
    assert changed.sampling == Sampling(2, 31_000, 0.0, 0.95)
    for text, message in (
        ("gpqa", "gpqa: no such task. Did you mean 'gpqa_diamond'?"),
        ("rg:gdc", "reasoning-gym has no such data set. Did you mean"),
        ("aime24,aime24", "aime24 is named twice"),
        (" , ", "names no task"),
        ("maths:x.jsonl", "no such task"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            parse_tasks(text)
    with pytest.raises(ConfigError, match=r"--top-p: 1\.5 is not between"):
        with_sampling(found[0], top_p=1.5)


def test_generated_problems_are_the_same_every_time_and_their_answers_get_full_marks() -> None:
    for name in ("held_out_1", "held_out_2", "rg:gcd"):
        (task,) = parse_tasks(name)
        problems = problems_of(task, 12)
        assert problems == problems_of(task, 12)
        assert len({problem.messages[0]["content"] for problem in problems}) == 12
        scorer = reward_for(task.grader)
        answers = [(f"\\boxed{{{problem.label['entry']['answer']}}}", problem.label) for problem in problems]
        assert {score.value for score in scorer.score_many(answers)} == {1.0}
        scorer.close()


class Parrot:
    """A responder that knows what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []

    def respond(self, asked: Any, sampling: Sampling, progress: Any) -> list[Response]:
        self.asked += asked
        texts = [f"\\boxed{{{one.messages[-1]['content'][-1]}}}" for one in asked]
        return [Response(text, len(text), number % 2 == 0) for number, text in enumerate(texts)]


def test_a_file_of_problems(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"prompt": "say 3", "label": 3}\n{"prompt": [{"role": "user", "content": "say 4"}], "label": "5"}\n'
    )
    task = LocalTask(f"math:{file}", "math", Sampling(3, 10))
    parrot, scorer = Parrot(), reward_for("math")
    found = run_local_task(task, problems_of(task, None), parrot, scorer, 1, lambda done, total: None)
    assert [(one.problem, one.index, one.score) for one in found] == [
        ("0", 0, 1), ("0", 1, 1), ("0", 2, 1), ("1", 0, 0), ("1", 1, 0), ("1", 2, 0),
    ]  # fmt: skip
    assert [one.truncated for one in found] == [True, False] * 3
    assert len({one.seed for one in parrot.asked}) == 6
    assert parrot.asked[4].seed == seed_of(1, "1", [{"role": "user", "content": "say 4"}], 1) < 2**63
    moved, other = Parrot(), tmp_path / "moved.jsonl"
    other.write_bytes(file.read_bytes())
    there = LocalTask(f"math:{other}", "math", Sampling(3, 10))
    run_local_task(there, problems_of(there, None), moved, scorer, 1, lambda done, total: None)
    assert [one.seed for one in moved.asked] == [one.seed for one in parrot.asked], "the place of a file does not count"
    for row, message in (
        ('{"prompt": "x"}', "rows.jsonl:2: .*label"),
        ('{"label": 1}', "rows.jsonl:2: "),
        ("nonsense", "rows.jsonl:2: "),
    ):
        file.write_text('{"prompt": "say 3", "label": 3}\n' + row + "\n")
        with pytest.raises(DataError, match=message):
            problems_of(task, None)
    file.write_text('{"prompt": "say 3", "label": [1]}\n')
    with pytest.raises(DataError, match=r"rows.jsonl: math: a label must be a string or a number"):
        run_local_task(task, problems_of(task, None), parrot, scorer, 1, lambda done, total: None)
    assert len(parrot.asked) == 6, "something was asked before the bad label was found"


# ---- rows for evalscope

GPQA_ROW = {"Question": "q", "Correct Answer": "a", **{f"Incorrect Answer {i}": str(i) for i in (1, 2, 3)}}
CASES = [{"input": "1\n", "output": "1\n", "testtype": "stdin"}]
LCB_ROW = {
    "question_content": "q", "starter_code": "", "public_test_cases": json.dumps(CASES),
    "private_test_cases": json.dumps(CASES), "metadata": "{}", "contest_date": "2024-09-01T00:00:00",
}  # fmt: skip


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    stem = "train" if name == "gpqa_diamond" else "test"
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_rows_are_laid_out_as_evalscope_reads_them(tmp_path: Path) -> None:
    write_rows(tmp_path, "aime24", [{"problem": "p", "answer": 23, "url": "x"}, {"problem": "p2", "answer": "007"}])
    staged = stage("aime24", tmp_path, tmp_path / "out", None, None)
    lines = [json.loads(line) for line in (staged.folder / "test.jsonl").read_text().splitlines()]
    assert (staged.rows, [line["answer"] for line in lines]) == (2, ["23", "007"])
    assert stage("aime24", tmp_path, tmp_path / "out", 1, None).rows == 1
    write_rows(tmp_path, "gpqa_diamond", [GPQA_ROW])
    assert (stage("gpqa_diamond", tmp_path, tmp_path / "gpqa", None, None).folder / "train.jsonl").exists()
    pickled = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(CASES)))).decode()
    dates = ("2024-07-31T23:59:59", "2024-08-01T00:00:00", "2025-02-28T12:00:00", "2025-03-01T00:00:00")
    rows = [{**LCB_ROW, "private_test_cases": pickled, "contest_date": date} for date in dates]
    write_rows(tmp_path, "live_code_bench", rows)
    window = ("2024-08-01", "2025-02-28")
    staged = stage("live_code_bench", tmp_path, tmp_path / "lcb", None, window)
    kept = pq.read_table(staged.folder / "test.parquet").to_pylist()
    assert [row["contest_date"] for row in kept] == list(dates[1:3])
    assert json.loads(kept[0]["private_test_cases"]) == CASES
    # Parquet in, too, with a true time stamp.
    table = pa.Table.from_pylist([{**LCB_ROW, "contest_date": np.datetime64("2024-09-01T00:00:00").astype(object)}])
    (tmp_path / "live_code_bench/test.jsonl").unlink()
    pq.write_table(table, tmp_path / "live_code_bench/test.parquet")
    assert stage("live_code_bench", tmp_path, tmp_path / "lcb2", None, window).rows == 1


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("aime24", {"problem": "p"}, "test.jsonl:1: the field 'answer' is missing; a row has \"problem\""),
        ("aime24", {"problem": "p", "answer": "x + 1"}, "answer is 'x \\+ 1', not a whole number"),
        ("aime24", {"problem": " ", "answer": "1"}, "problem is no text, or empty"),
        ("gpqa_diamond", {**GPQA_ROW, "Correct Answer": None}, "Correct Answer is no text"),
        ("live_code_bench", {**LCB_ROW, "private_test_cases": "junk"}, "private_test_cases: neither JSON nor base64"),
        ("live_code_bench", {**LCB_ROW, "contest_date": "soon"}, "Invalid isoformat"),
        (
            "live_code_bench",
            {**LCB_ROW, "contest_date": "2020-01-01"},
            "holds no row between 2024-08-01 and 2025-02-28",
        ),
    ],
)
def test_bad_rows_are_named(name: str, row: dict[str, Any], message: str, tmp_path: Path) -> None:
    window = ("2024-08-01", "2025-02-28") if name == "live_code_bench" else None
    with pytest.raises(DataError, match=message):
        stage(name, write_rows(tmp_path, name, [row]), tmp_path / "out", None, window)


def test_missing_rows_say_what_to_put_where(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no copy of gpqa_diamond: make .*gpqa_diamond/train.jsonl .* of rows with"
    ) as caught:
        stage("gpqa_diamond", tmp_path, tmp_path / "out", None, None)
    assert what_to_put("gpqa_diamond", tmp_path) in str(caught.value)


class Payload:
    def __reduce__(self) -> Any:
        return print, ("executed",)


def test_no_pickle_is_executed(capsys: pytest.CaptureFixture[str]) -> None:
    def stored(value: Any) -> str:
        return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()

    assert stored_cases(stored(json.dumps(CASES))) == CASES
    assert stored_cases(json.dumps(CASES)) == CASES
    for value in (Payload(), [Payload()], {"a": Payload()}, ["a", "b"], 5):
        with pytest.raises(ValueError, match="a pickle"):
            stored_cases(stored(value))
    for text in ("", "é", "{}", '[{"input": "1"}]', base64.b64encode(b"junk").decode(), stored("[]")[:-8]):
        with pytest.raises(ValueError):
            stored_cases(text)
    assert capsys.readouterr().out == ""


def test_problems_of_livecodebench_become_labels_of_the_sandbox() -> None:
    sandbox = Sandbox()
    script = as_label(json.dumps({"inputs": ["3 4\n", "1\n"], "outputs": ["7\n", "\n"], "fn_name": None}))
    assert len(script["tests"]) == 1, "a case that expects no output proves nothing"
    program = "print(sum(map(int, input().split())))"
    assert judge(program, parse_problem(script), sandbox).outcome == "passed"
    assert judge("", parse_problem(script), sandbox).outcome == "wrong answer"
    calls = as_label(json.dumps({"inputs": ["[1, 2]\n3", "[]\n4"], "outputs": ["6", "4"], "fn_name": "total"}))
    solution = "class Solution:\n    def total(self, a, b):\n        return sum(a) + b"
    assert judge(solution, parse_problem(calls), sandbox).outcome == "passed"
    assert judge(solution.replace("+ b", "- b"), parse_problem(calls), sandbox).outcome == "wrong answer"


# ---- evalscope's side


def test_evalscope_that_is_missing_or_old_is_told_how_to_get(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("INFIR2_EVALSCOPE_PYTHON", raising=False)
    monkeypatch.setattr("infir2.evaluate.harness.importlib_util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed here: pip install 'infir2\[eval\]'"):
        find_evalscope(None)
    with pytest.raises(UserError, match="cannot be run"):
        find_evalscope(tmp_path / "no-python")
    for version, message in (("1.2.0", "evalscope 1.2.0, which is too old"), ("", "has no evalscope")):
        fake = tmp_path / f"python{version}"
        fake.write_text(f"#!/bin/sh\n{f'echo {version}' if version else 'exit 1'}\n")
        fake.chmod(0o755)
        monkeypatch.setenv("INFIR2_EVALSCOPE_PYTHON", str(fake))
        with pytest.raises(UserError, match=message):
            find_evalscope(None)


def test_what_evalscope_says_when_it_fails_is_passed_on(tmp_path: Path) -> None:
    """A process in evalscope's place that ends as the real one does without network."""
    told = '{"failed": "aime24", "error": "ConnectionError", "message": "no route\\nmore"}'
    fake = tmp_path / "python"
    lines = [
        "import json, sys",
        "order = json.loads(sys.stdin.readline())",
        f"open(order['outcome'], 'w').write({told!r})",
    ]
    fake.write_text("\n".join([f"#!{sys.executable}", *lines, "sys.exit(1)"]))
    fake.chmod(0o755)
    endpoint = Endpoint("http://127.0.0.1:9/v1", "key", "m")
    settings = Settings(fake, None, None, 1)
    out = tmp_path / "out"
    with pytest.raises(
        DataError, match=r"could not be fetched: no route\. Without network give --data DIR; make DIR/aime24/"
    ):
        run_benchmarks([BENCHMARKS["aime24"]], prepare([], settings, out), endpoint, settings, out, lambda a, b: None)


def test_a_refused_request_is_no_wrong_answer(tmp_path: Path) -> None:
    for kind in ("predictions", "reviews"):
        (tmp_path / kind / "m").mkdir(parents=True)
    choice = {"message": {"content": "the prompt has 534 tokens"}, "stop_reason": "model_length"}
    row = {"index": 0, "model_output": {"choices": [choice], "usage": None}}
    (tmp_path / "predictions/m/a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="aime24: the server refused a request: the prompt has 534 tokens"):
        read_samples(tmp_path, BENCHMARKS["aime24"])


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"the server ended at its start: infir2: error: .*nothing: no such folder; a model"
    ):
        LocalServer(str(tmp_path / "nothing"), timeout_s=120).__enter__()


def test_bad_command_lines_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for words, message in (
        (["a", "--tasks", "held_out_1", "--paired"], "--paired compares two models, not 1"),
        (["a", "--tasks", "held_out_1", "--limit", "0"], "--limit: 0 is less than 1"),
        (["a", "--tasks", "held_out_1", "--data", str(tmp_path / "no")], f"--data {tmp_path / 'no'}: no such folder"),
        ([str(tmp_path / "gone"), "--tasks", "held_out_1"], f"{tmp_path / 'gone'}: no such folder; a model"),
        (["m", "--tasks", "held_out_1", "--api-url", "http://127.0.0.1:9/v1"], "http://127.0.0.1:9/v1: "),
    ):
        assert cli.main(["eval", *words, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"infir2: error: {message}")
    assert math.isclose(len(list(tmp_path.glob("out/*"))), 0)
