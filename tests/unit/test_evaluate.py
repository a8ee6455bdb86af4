"""Figures against numbers computed by hand, tasks and their rows, and what of evalscope's world is kept out."""

import base64
import json
import math
import pickle
import re
import sys
import threading
import time
import urllib.error
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infir2 import cli
from infir2.errors import ConfigError, DataError, UserError
from infir2.evaluate.evalscope_process import as_label, program_limits
from infir2.evaluate.harness import Endpoint, Settings, find_evalscope, prepare, read_samples, run_benchmarks
from infir2.evaluate.local import run_local_task
from infir2.evaluate.local_data import stage, what_to_put
from infir2.evaluate.respond import MAX_ASKED, ApiResponder, Asked, Response, _retry_after, seed_of
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


def test_equal_values_have_an_interval_that_covers_what_was_not_drawn() -> None:
    """The value v has chance p, others are all at one end: if n draws are all v, the mean is in the interval, unless n
    draws of v are no more than 2.5 % likely."""
    for value, lowest, count in product((-1.0, -0.25, 0.0, 0.5, 1.0), (-1.0, 0.0), (2, 5, 30)):
        if value < lowest:
            continue
        low, high = mean_interval(np.full(count, value), lowest)
        assert lowest <= low <= value <= high <= 1
        assert high - low > 0
        for chance, other in product(np.linspace(0.001, 1, 200), (lowest, 1.0)):
            mean = chance * value + (1 - chance) * other
            assert low - 1e-9 <= mean <= high + 1e-9 or chance**count <= 0.025 + 1e-9
    noise = np.array([0.3 - 0.1, 0.4 - 0.2, 0.5 - 0.3] * 5)
    assert len(set(noise)) > 1
    low, high = mean_interval(noise, -1.0)
    assert high - low > 0.1, "equal but for rounding"
    assert mean_interval(np.array([0.5])) == mean_interval(np.array([1.0])) == (None, None)
    pair = paired(samples({"a": [0]}), samples({"a": [1]}))
    assert (pair.low, pair.high, pair.difference) == (None, None, 1)
    assert summarise(samples({"a": [0, 1]})).low is None


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
    assert (same.difference, same.p_value, same.low) == (0, 1, -same.high)
    assert same.high == pytest.approx(1 - 0.025 ** (1 / 3)), "three problems do not show that there is no difference"
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


# ---- other servers


@contextmanager
def server_that_says(
    *replies: tuple[int, dict[str, Any], dict[str, str]],
) -> Iterator[tuple[ApiResponder, list[float]]]:
    """Someone else's server: one reply after the other, and the last one again; (0, ...) hangs up. It comes as somebody
    who asks it, and the times at which it was asked."""
    times: list[float] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            code, body, headers = replies[min(len(times), len(replies) - 1)]
            times.append(time.monotonic())
            self.rfile.read(int(self.headers["content-length"]))
            if not code:
                return
            content = json.dumps(body).encode()
            self.send_response(code)
            for name, value in {**headers, "content-length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        responder = ApiResponder(f"http://127.0.0.1:{server.server_port}/v1", "key", "m", 1)
        responder.pause_s = 0.01
        yield responder, times
        server.shutdown()


def answer(finish: str = "stop", **message: Any) -> tuple[int, dict[str, Any], dict[str, str]]:
    return 200, {"choices": [{"message": message, "finish_reason": finish}], "usage": {"completion_tokens": 9}}, {}


def ask(responder: ApiResponder, count: int = 1) -> list[Response]:
    asked = [Asked([{"role": "user", "content": "q"}], number) for number in range(count)]
    return responder.respond(asked, Sampling(1, 10), lambda done, total: None)


def test_a_thought_that_the_server_took_out_of_the_text_is_put_back() -> None:
    """So that a box in a thought that was cut off is no answer, and one behind it is."""
    maybe = "maybe \\boxed{5}"
    said = {
        f"<think>{maybe}": answer("length", content=None, reasoning_content=maybe),
        f"<think>{maybe} ": answer("length", content="", reasoning=maybe + " "),
        f"<think>{maybe}</think>I give up.": answer(content="I give up.", reasoning_content=maybe),
        "<think>no</think>\\boxed{5}": answer(content="\\boxed{5}", reasoning="no"),
        "\\boxed{5}": answer(content="\\boxed{5}", reasoning_content=None),
    }
    with server_that_says(*said.values()) as (responder, _):
        found = ask(responder, len(said))
    assert [one.text for one in found] == list(said)
    assert [one.truncated for one in found] == [True, True, False, False, False]
    scorer = reward_for("math")
    assert [score.value for score in scorer.score_many([(one.text, "5") for one in found])] == [0, 0, 0, 1, 1]


def test_a_busy_server_is_asked_again() -> None:
    busy = {"error": {"message": "too many"}}
    well = answer(content="x")
    with server_that_says((429, busy, {"Retry-After": "1"}), (503, busy, {}), (502, busy, {}), well) as (
        responder,
        times,
    ):
        assert [one.text for one in ask(responder)] == ["x"]
        assert 1.0 <= times[1] - times[0] < 2.0, "as long as it asked for"
        assert len(times) == 4
    with server_that_says(well, (0, {}, {}), well) as (responder, times):
        assert len(ask(responder, 2)) == 2
        assert len(times) == 3, "it had answered before: asked again after it hung up"


def test_a_server_that_stays_busy_or_refuses_ends_the_evaluation() -> None:
    later = formatdate(time.time() + 3600, usegmt=True)
    for code, asked in ((429, MAX_ASKED), (400, 1), (500, 1), (0, 1)):
        with server_that_says((code, {"error": {"message": "no"}}, {})) as (responder, times):
            with pytest.raises(UserError, match=f"{code}: no" if code else "closed connection"):
                ask(responder)
            assert len(times) == asked
    error = urllib.error.HTTPError("u", 429, "busy", Message(), None)
    assert _retry_after(error) == 0
    for told, seconds in ((later, 60), ("7", 7), ("soon", 0), ("-3", 0), (formatdate(0, usegmt=True), 0)):
        error.headers["Retry-After"] = told
        assert _retry_after(error) == seconds
        del error.headers["Retry-After"]


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


def test_programs_of_livecodebench_have_its_limits() -> None:
    sandbox = Sandbox(program_limits(60.0))
    large = as_label(json.dumps({"inputs": ["x"], "outputs": ["1 " * 700_000], "fn_name": None}))
    program = "held = bytearray(5 << 28)\nprint('1 ' * 700_000)"
    assert judge(program, parse_problem(large), sandbox).outcome == "passed"
    strange = json.dumps("a\u2028b", ensure_ascii=False)  # JSON may hold it as it is
    calls = as_label(json.dumps({"inputs": [strange], "outputs": [strange], "fn_name": "same"}))
    assert judge("def same(text): return text", parse_problem(calls), sandbox).outcome == "passed"


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


INTERRUPTED = """
import json, pathlib, sys
order = json.loads(sys.stdin.readline())
(task,) = order["tasks"]
predictions = pathlib.Path(task["work_dir"], "predictions/m/a.jsonl")
print(json.dumps([task["work_dir"], task.get("use_cache"), predictions.exists() and predictions.read_text()]),
      file=open({told!r}, "a"))
predictions.parent.mkdir(parents=True, exist_ok=True)
predictions.write_text('{{"index": 0}}\\n{{"ind')
open(order["outcome"], "w").write('{{"failed": "aime24", "error": "Cut", "message": "off"}}')
"""


def test_answers_are_kept_for_the_same_rows_and_for_no_others(tmp_path: Path) -> None:
    """A process in evalscope's place that is always interrupted, in the middle of a line."""
    fake, told, out = tmp_path / "python", tmp_path / "told.jsonl", tmp_path / "out"
    fake.write_text(f"#!{sys.executable}\n" + INTERRUPTED.format(told=str(told)))
    fake.chmod(0o755)
    rows = {name: {"problem": f"say {name}", "answer": "1"} for name in ("one", "two")}
    for folder, row in (("a", "one"), ("a", "two"), ("b", "two"), ("b", "one")):
        data = write_rows(tmp_path / folder, "aime24", [rows[row]])
        settings, endpoint = Settings(fake, data, None, 1), Endpoint("http://127.0.0.1:9/v1", "key", "m", "weights")
        benchmarks = [BENCHMARKS["aime24"]]
        with pytest.raises(UserError, match="Cut: off"):
            run_benchmarks(benchmarks, prepare(benchmarks, settings, out), endpoint, settings, out, lambda a, b: None)
    one, two, again, back = map(json.loads, told.read_text().splitlines())
    assert one[0] != two[0]
    assert (one[1:], two[1:]) == ([None, False], [None, False]), "nothing is known about these rows"
    assert again == [two[0], two[0], '{"index": 0}\n'], "the same rows in another folder; the torn line has gone"
    assert back[:2] == [one[0], one[0]]


def test_a_sample_that_was_scored_twice_counts_once(tmp_path: Path) -> None:
    """As evalscope reads its own files: the last row of a sample counts, and scores without a response do not."""
    choice = {"message": {"content": "text"}, "stop_reason": "stop"}
    prediction = {"model_output": {"choices": [choice], "usage": {"output_tokens": 3}}}
    reviews = []
    for index, value in ((0, 0.0), (1, 1.0), (0, 1.0), (7, 0.0)):
        score = {"status": "success", "value": {"acc": value}, "main_score_name": "acc", "explanation": None}
        place = {"group_id": 0, "generation_index": index}
        reviews.append({"index": index, "sample_score": {**place, "score": {**score, "extracted_prediction": "a"}}})
    for kind, found in (("predictions", [{"index": i, **prediction} for i in (0, 1, 0)]), ("reviews", reviews)):
        (tmp_path / kind / "m").mkdir(parents=True)
        (tmp_path / kind / "m/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    found = read_samples(tmp_path, BENCHMARKS["aime24"])
    assert [(sample.index, sample.score) for sample in found] == [(0, 1.0), (1, 1.0)]


def test_a_refused_request_is_no_wrong_answer(tmp_path: Path) -> None:
    for kind in ("predictions", "reviews"):
        (tmp_path / kind / "m").mkdir(parents=True)
    choice = {"message": {"content": "the prompt has 534 tokens"}, "stop_reason": "model_length"}
    row = {"index": 0, "model_output": {"choices": [choice], "usage": None}}
    (tmp_path / "predictions/m/a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="aime24: the server refused a request: the prompt has 534 tokens"):
        read_samples(tmp_path, BENCHMARKS["aime24"])


def test_models_and_tasks_whose_names_are_alike_keep_their_results_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tasks = []
    for number, file in enumerate(("a/b.jsonl", "a-b.jsonl")):
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text(json.dumps({"prompt": f"say {number}", "label": number}) + "\n")
        tasks.append(f"math:{file}")
    with server_that_says(answer(content="\\boxed{1}")) as (responder, _):
        words = ["--tasks", ",".join(tasks), "--samples", "1", "--out", "out", "--api-url", responder.url]
        assert cli.main(["eval", "m/x", "m-x", "m-x-2", "M-X", *words]) == 0
    models = [model["name"] for model in json.loads(Path("out/eval.json").read_text())["models"]]
    assert models == ["m-x", "m-x-2", "m-x-2-2", "M-X-3"]
    for name in models:
        files = {path.name: json.loads(path.read_text())["score"] for path in Path("out", name).glob("*.jsonl")}
        assert files == {"math-a-b.jsonl.jsonl": 0.0, "math-a-b.jsonl-2.jsonl": 1.0}
    assert "(–)" in capsys.readouterr().out, "one problem, no interval"


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
        (["m", "--tasks", "held_out_1", "--api-url", "http://127.0.0.1:9/v1"], "http://127.0.0.1:9/v1/models: "),
        *(
            (["m", "--tasks", "held_out_1", "--api-url", url], f"--api-url {url}: is not the address of a server")
            for url in ("notaurl", "ftp://a/v1", "http:///v1", "http://a:b/v1", "http://a b/v1", "http://a/\u00fc")
        ),
    ):
        assert cli.main(["eval", *words, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"infir2: error: {message}")
    assert math.isclose(len(list(tmp_path.glob("out/*"))), 0)
