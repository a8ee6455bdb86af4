"""`infir2 eval` with a model that was taught right and wrong answers by heart: evalscope drives our real server, and
every score is computed again here from the stored responses, by other means."""

import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_chat

from infir2.evaluate.server import LocalServer

ROOT = Path(__file__).parents[2]
SAMPLES = 6
AIME = {"What is 20 + 3?": 23, "What is 7 times 6?": 42, "What is 100 - 1?": 99}
GPQA = {
    "Which gas do plants take in?": "carbon dioxide",
    "Which metal is liquid?": "mercury",
    "Which planet is red?": "Mars",
    "Which salt is on the table?": "sodium chloride",
}
WRONG = ("helium", "wood", "granite")
# Question: a right program, a wrong one, and two cases (input, output) that show it.
PROGRAMS = {
    "Print the sum of the two numbers.": (
        ("print(sum(map(int, input().split())))", "print(7)"),
        (("3 4\n", "7\n"), ("9 9\n", "18\n")),
    ),
    "Print the word twice.": (("print(input() * 2)", "print(undefined)"), (("ab\n", "abab\n"), ("c\n", "cc\n"))),
}


def evalscope_python() -> str | None:
    """The interpreter of the environment that `make test` makes, or one that is named."""
    made = ROOT / ".venv-eval/bin/python"
    return os.environ.get("INFIR2_EVALSCOPE_PYTHON") or (str(made) if made.exists() else None)


needs_evalscope = pytest.mark.skipif(
    evalscope_python() is None,
    reason="evalscope is not installed: `make eval-environment`, or set INFIR2_EVALSCOPE_PYTHON",
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def aime_messages(question: str) -> list[dict[str, str]]:
    start = "\nSolve the following math problem step by step. Put your answer inside \\boxed{}.\n\n"
    return [user(f"{start}{question}\n\nRemember to put your answer inside \\boxed{{}}.")]


def gpqa_letter(prompt: str, answer: str) -> str:
    return re.search(rf"^([A-D])\) {re.escape(answer)}$", prompt, flags=re.MULTILINE)[1]


GPQA_PROMPT = (
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'ANSWER: [LETTER]' (without quotes) where [LETTER] is one of A,B,C,D. Think step by step before answering.\n\n"
)
LCB_SYSTEM = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
    "correct Python program that matches the specification and passes all tests. You will NOT return anything except "
    "for the program."
)
LCB_PROMPT = (
    "### Question:\n{question}\n\n### Format: Read the inputs from stdin solve the problem and write the answer to "
    "stdout (do not directly test on the sample inputs). Enclose your code within delimiters as follows.\n"
    "```python\n# YOUR CODE HERE\n```\n\n ### Answer: (use the provided format with backticks)\n\n"
)


def fenced(program: str) -> str:
    return f"```python\n{program}\n```"


def lessons() -> list[tuple[list[dict[str, str]], str]]:
    """A right and a wrong answer to everything, so that samples differ."""
    found = []
    for question, answer in AIME.items():
        found += [(aime_messages(question), f"<think>\nEasy.\n</think>\n\\boxed{{{answer}}}")]
        found += [(aime_messages(question), f"<think>\nIs it \\boxed{{{answer}}}?\n</think>\n\\boxed{{5}}")]
    for question in GPQA:
        for letter in "ABCD":  # which one is right depends on evalscope's order, so all are taught
            found += [([user(GPQA_PROMPT + question)], f"ANSWER: {letter}")]
    for question, ((right, wrong), _) in PROGRAMS.items():
        messages = [{"role": "system", "content": LCB_SYSTEM}, user(LCB_PROMPT.format(question=question))]
        found += [(messages, fenced(right)), (messages, fenced(wrong))]
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_chat.write_taught_model(tmp_path_factory.mktemp("taught"), lessons(), steps=200)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of our own in the schemas of the benchmarks."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"problem": question, "answer": str(answer)} for question, answer in AIME.items()]
    for name in ("aime24", "aime25"):
        write_jsonl(folder / name / "test.jsonl", rows)
    wrong = {f"Incorrect Answer {number}": text for number, text in enumerate(WRONG, 1)}
    gpqa = [{"Question": question, "Correct Answer": answer, **wrong} for question, answer in GPQA.items()]
    write_jsonl(folder / "gpqa_diamond" / "train.jsonl", gpqa)
    problems = [problem_row(question, cases, "2024-09-01T00:00:00") for question, (_, cases) in PROGRAMS.items()]
    problems.append(problem_row("Print nothing new.", (("1\n", "1\n"), ("1\n", "1\n")), "2024-07-31T00:00:00"))
    (folder / "live_code_bench").mkdir()
    pq.write_table(pa.Table.from_pylist(problems), folder / "live_code_bench" / "test.parquet")
    return folder


def problem_row(question: str, cases: Sequence[tuple[str, str]], date: str) -> dict[str, str]:
    """The first case is public, the second private."""
    public, private = (json.dumps([{"input": i, "output": o, "testtype": "stdin"}]) for i, o in cases)
    return {
        "question_content": question, "starter_code": "", "public_test_cases": public, "private_test_cases": private,
        "metadata": "{}", "contest_date": date,
    }  # fmt: skip


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def infir2_eval(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "infir2", "eval", *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=500)


def samples_of(out: Path, model: str, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / model / f"{task}.jsonl").read_text().splitlines()]


def stored(out: Path, task: str) -> list[dict[str, Any]]:
    """evalscope's own predictions."""
    (file,) = out.glob(f"hf/evalscope/{task}-*/predictions/*/*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@needs_evalscope
@pytest.mark.slow
def test_evalscope_runs_against_our_server_and_scores_are_those_computed_by_hand(
    model: Path, data: Path, tmp_path: Path
) -> None:
    tasks = ("aime24", "aime25", "gpqa_diamond", "livecodebench_v5")
    done = infir2_eval(
        str(model), "--tasks", ",".join(tasks), "--samples", str(SAMPLES), "--max-tokens", "60", "--temperature", "1",
        "--data", str(data), "--out", str(tmp_path), "--evalscope-python", evalscope_python(), "--dtype", "float32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + (tmp_path / "hf/evalscope/evalscope.log").read_text()[-3000:]
    by_hand = dict(zip(tasks, (aime_by_hand, aime_by_hand, gpqa_by_hand, lcb_by_hand)))
    (result,) = json.loads((tmp_path / "eval.json").read_text())["models"]
    assert set(result["tasks"]) == set(tasks)
    for task in tasks:
        predictions = stored(tmp_path, task)
        scores: dict[str, list[float]] = {}
        for row in predictions:
            question = row["messages"][-2]["content"]
            scores.setdefault(question, []).append(by_hand[task](question, text_of(row)))
        assert {len(found) for found in scores.values()} == {SAMPLES}
        assert 0 < statistics.fmean(map(statistics.fmean, scores.values())) < 1, f"{task}: proves nothing"
        reported = result["tasks"][task]
        assert reported["problems"] == len(scores)
        assert reported["average"] == pytest.approx(statistics.fmean(map(statistics.fmean, scores.values())))
        assert reported["pass_at"]["1"] == pytest.approx(reported["average"])
        solved = statistics.fmean(any(found) for found in scores.values())
        assert reported["pass_at"][str(SAMPLES)] == pytest.approx(solved)
        tokens = [row["model_output"]["usage"]["output_tokens"] for row in predictions]
        assert reported["mean_tokens"] == pytest.approx(statistics.fmean(tokens))
        assert reported["truncated"] == pytest.approx(statistics.fmean(count == 60 for count in tokens), abs=1e-9)
        assert sorted(sample["score"] for sample in samples_of(tmp_path, "hf", task)) == sorted(
            itertools.chain(*scores.values())
        )
    assert result["tasks"]["livecodebench_v5"]["problems"] == 2, "a problem from before the window was asked"
    outcomes = {sample["decided"].partition(":")[0] for sample in samples_of(tmp_path, "hf", "livecodebench_v5")}
    assert "passed" in outcomes
    assert len(outcomes) > 1


def text_of(row: dict[str, Any]) -> str:
    """The part of a stored response that answers: evalscope keeps thoughts apart."""
    content = row["model_output"]["choices"][0]["message"]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def aime_by_hand(prompt: str, response: str) -> float:
    (answer,) = [value for question, value in AIME.items() if aime_messages(question)[0]["content"] == prompt]
    boxes = re.findall(r"\\boxed\{(\d+)\}", response.split("</think>")[-1])
    return float(bool(boxes) and int(boxes[-1]) == answer)


def gpqa_by_hand(prompt: str, response: str) -> float:
    assert prompt.startswith(GPQA_PROMPT)
    (answer,) = [text for question, text in GPQA.items() if question in prompt]
    said = re.findall(r"ANSWER: ([A-D])", response)
    return float(bool(said) and said[-1] == gpqa_letter(prompt, answer))


def lcb_by_hand(prompt: str, response: str) -> float:
    """The programs that were taught are known; a garbled one is never right by chance."""
    (right,) = [pair[0] for question, (pair, _) in PROGRAMS.items() if LCB_PROMPT.format(question=question) == prompt]
    parts = response.split("```")
    return float(len(parts) > 2 and parts[-2] == f"python\n{right}\n")


def plain_rows(folder: Path) -> Path:
    """The taught math questions, as a file of problems for a local task."""
    rows = [{"prompt": aime_messages(question), "label": answer} for question, answer in AIME.items()]
    return write_jsonl(folder / "math.jsonl", rows)


@pytest.mark.slow
def test_local_tasks_score_the_same_in_process_and_through_a_server(model: Path, tmp_path: Path) -> None:
    """The same seeds, so the very same responses; and the scores are those computed by hand."""
    file = plain_rows(tmp_path)
    settings = ["--tasks", f"math:{file}", "--samples", "4", "--max-tokens", "40", "--temperature", "1"]
    here = infir2_eval(str(model), *settings, "--out", str(tmp_path / "here"), "--dtype", "float32")
    assert here.returncode == 0, here.stderr
    with LocalServer(str(model), ["--dtype", "float32", "--name", "hf"], timeout_s=120) as server:
        words = ["hf", *settings, "--out", str(tmp_path / "there"), "--api-url", server.url]
        there = infir2_eval(*words, INFIR2_API_KEY=server.api_key)
        assert there.returncode == 0, there.stderr
        unknown = infir2_eval("other", *words[1:], INFIR2_API_KEY=server.api_key)
        assert (unknown.returncode, unknown.stdout) == (2, "")
        assert f"{server.url}: serves hf, not other" in unknown.stderr
    (first,), (second,) = (list(tmp_path.glob(f"{place}/hf/*.jsonl")) for place in ("here", "there"))
    assert first.read_text() == second.read_text()
    samples = [json.loads(line) for line in first.read_text().splitlines()]
    assert len({sample["response"] for sample in samples}) > 3
    for sample in samples:
        prompt = aime_messages(list(AIME)[int(sample["problem"])])[0]["content"]
        thinks_on = "<think>" in sample["response"].split("</think>")[-1]
        assert sample["score"] == (0.0 if thinks_on else aime_by_hand(prompt, sample["response"]))
    assert 0 < statistics.fmean(sample["score"] for sample in samples) < 1
    assert "avg@k" in here.stdout


@pytest.mark.slow
def test_two_models_are_compared_problem_by_problem(model: Path, tmp_path: Path) -> None:
    other = small_chat.write_chat_model(tmp_path / "noise")
    words = ["--tasks", f"math:{plain_rows(tmp_path)}", "--paired", "--samples", "4", "--max-tokens", "40"]
    done = infir2_eval(str(other), str(model), *words, "--out", str(tmp_path / "out"), "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "out/eval.json").read_text())
    noise, taught = content["models"]
    assert (noise["name"], taught["name"]) == ("hf", "hf-2"), "two folders of one name"
    (pair,) = content["paired"]["tasks"].values()
    averages = [next(iter(one["tasks"].values()))["average"] for one in (noise, taught)]
    assert pair["difference"] == pytest.approx(averages[1] - averages[0])
    assert averages[1] > averages[0] == 0
    assert (pair["worse"], pair["problems"]) == (0, 3)
    # All signs equal: of 2^3 assignments two are as far from 0, unless a problem shows no difference.
    assert pair["p_value"] == pytest.approx(2 ** (1 - pair["better"]))
    assert "hf-2 minus hf" in done.stdout


@needs_evalscope
@pytest.mark.slow
def test_nothing_is_left_when_an_evaluation_is_killed_and_the_same_command_goes_on(
    model: Path, data: Path, tmp_path: Path
) -> None:
    words = [
        str(model), "--tasks", "aime24", "--samples", "10", "--max-tokens", "40", "--concurrency", "1",
        "--data", str(data), "--out", str(tmp_path), "--evalscope-python", evalscope_python(),
    ]  # fmt: skip
    killed = subprocess.Popen([sys.executable, "-m", "infir2", "eval", *words], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (before := finished(tmp_path)):
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started = children(killed.pid)
    assert len(started) == 2, "a server and evalscope"
    killed.kill()
    killed.wait()
    while any(is_running(pid) for pid in started):
        assert time.monotonic() < deadline, "a process was left behind"
        time.sleep(0.1)
    stored_then = finished(tmp_path)
    assert before <= stored_then < 30, "killed too late to prove anything"
    done = infir2_eval(*words)
    assert done.returncode == 0, done.stderr
    assert f"resuming from cache — {stored_then} cached" in (tmp_path / "hf/evalscope/evalscope.log").read_text()
    assert len(samples_of(tmp_path, "hf", "aime24")) == 30


def finished(out: Path) -> int:
    return sum(file.read_bytes().count(b"\n") for file in out.glob("hf/evalscope/aime24-*/predictions/*/*.jsonl"))


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
