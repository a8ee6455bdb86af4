"""Tasks, the problems of local ones, and other people's servers that are asked: busy, rude or hiding thoughts."""

import json
import re
import threading
import time
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from infir2 import cli
from infir2.errors import ConfigError, DataError, UserError
from infir2.evaluate.local import run_local_task
from infir2.evaluate.respond import MAX_ASKED, ApiResponder, Asked, Response, _retry_after, seed_of
from infir2.evaluate.tasks import BENCHMARKS, LocalTask, Sampling, parse_tasks, problems_of, with_sampling
from infir2.reward.dispatch import reward_for

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


def test_a_refusal_is_told_while_other_answers_are_under_way() -> None:
    released, last = threading.Event(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if asked["seed"]:
                last.set()
                released.wait(30)
            else:
                last.wait(30)
            self.send_error(400)

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        began = time.monotonic()
        try:
            with pytest.raises(UserError, match="400"):
                ask(ApiResponder(f"http://127.0.0.1:{server.server_port}/v1", "key", "m", 2), 2)
            assert time.monotonic() - began < 15
        finally:
            released.set()
            server.shutdown()


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
