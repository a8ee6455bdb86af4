"""evalscope's side of an evaluation: its rows, its process, what it stored, and what of its world is kept out."""

import base64
import json
import pickle
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infir2.errors import DataError, UserError
from infir2.evaluate.evalscope_process import as_label, program_limits
from infir2.evaluate.harness import (
    Endpoint,
    LineCounter,
    Settings,
    find_evalscope,
    prepare,
    read_samples,
    run_benchmarks,
)
from infir2.evaluate.local_data import stage, what_to_put
from infir2.evaluate.server import LocalServer
from infir2.evaluate.stored_cases import stored_cases
from infir2.evaluate.tasks import BENCHMARKS
from infir2.reward.code import judge, parse_problem
from infir2.reward.sandbox import Sandbox

# ---- rows

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


# ---- its process and its files


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


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"the server ended at its start: infir2: error: .*nothing: no such folder; a model"
    ):
        LocalServer(str(tmp_path / "nothing"), timeout_s=120).__enter__()


def test_lines_are_counted_as_files_come_and_grow(tmp_path: Path) -> None:
    counter = LineCounter([tmp_path / "a", tmp_path / "b"], "reviews/*/*.jsonl")
    assert counter.count() == 0
    for name in ("a", "b"):
        (tmp_path / name / "reviews" / "m").mkdir(parents=True)
        (tmp_path / name / "reviews" / "m" / "x.jsonl").write_text("1\n2\n3")
    assert counter.count() == 4
    with open(tmp_path / "a/reviews/m/x.jsonl", "a") as file:
        file.write("3\n4\n")
    assert counter.count() == counter.count() == 6
