"""Programs as answers: run them in the sandbox on test cases and compare what they print or return.

The expected outputs never enter the sandbox. The comparison happens here, on the bytes that came out; the exit code can
only lower a verdict (a crash after the right output fails), never raise it. All cases must pass for a score of 1.
"""

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from infir2.errors import DataError
from infir2.reward.extract import Think, after_thinking
from infir2.reward.sandbox import Limits, ProgramRun, Sandbox
from infir2.reward.score import Score

_FENCE = re.compile(r"^[ \t]*```[ \t]*(?P<language>[\w+-]*)[^\n]*$", re.MULTILINE)
_PYTHON = {"", "python", "python3", "py"}


@dataclass(frozen=True)
class StdioCase:
    """Standard input and the standard output it must give."""

    stdin: str
    stdout: str


@dataclass(frozen=True)
class CallCase:
    """Arguments of a function and the value it must return (JSON values; tuples count as lists)."""

    arguments: tuple[Any, ...]
    expected: Any


@dataclass(frozen=True)
class CodeTests:
    """All cases of one problem. With a ``function`` they are calls, else scripts."""

    cases: tuple[StdioCase | CallCase, ...]
    function: str | None = None


@dataclass(frozen=True)
class Verdict:
    """``passed`` of ``total`` cases before the first failure, and what that was: ``passed``, ``wrong answer``,
    ``error``, ``timeout``, ``output``."""

    passed: int
    total: int
    outcome: str


def parse_problem(label: Any) -> CodeTests:
    """A label, as an object or as JSON text, in either of the two forms in use (LiveCodeBench's and APPS / TACO's):

    ``[{"input": ..., "output": ..., "testtype": "stdin" | "functional"}]`` (or an object with these under ``"tests"``
    and ``"fn_name"``; functional inputs have one JSON value a line), or
    ``{"inputs": [...], "outputs": [...], "fn_name": ...}``. DataError for others, and for cases that prove nothing.
    """
    try:
        data = json.loads(label) if isinstance(label, str) else label
        if isinstance(data, dict) and "inputs" in data:
            problem = _from_columns(data)
        else:
            problem = _from_rows({"tests": data} if isinstance(data, list) else data)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"code: a label that is not a set of test cases ({type(error).__name__}: {error}); it should read "
            '{"inputs": [...], "outputs": [...], "fn_name": null} or [{"input": ..., "output": ...}]'
        ) from None
    if not problem.cases:
        raise DataError("code: a label without test cases")
    if any(isinstance(case, StdioCase) and not case.stdout.strip() for case in problem.cases):
        raise DataError("code: a test case whose expected output is empty proves nothing; remove it")
    return problem


def _from_columns(data: dict[str, Any]) -> CodeTests:
    function = data.get("fn_name")
    pairs = list(zip(data["inputs"], data["outputs"], strict=True))
    if function:
        return CodeTests(tuple(CallCase(tuple(i), o) for i, o in pairs), str(function))
    return CodeTests(tuple(StdioCase(_as_text(i), _as_text(o)) for i, o in pairs))


def _from_rows(data: dict[str, Any]) -> CodeTests:
    tests, function = data["tests"], data.get("fn_name")
    kinds = {test.get("testtype", "stdin") for test in tests}
    if kinds == {"functional"}:
        if not function:
            raise ValueError('functional tests need "fn_name"')
        calls = ((_json_lines(t["input"]), json.loads(t["output"])) for t in tests)
        return CodeTests(tuple(CallCase(*call) for call in calls), str(function))
    if kinds - {"stdin"}:
        raise ValueError(f"testtypes {sorted(map(str, kinds))}")
    return CodeTests(tuple(StdioCase(_as_text(t["input"]), _as_text(t["output"])) for t in tests))


def _json_lines(text: str) -> tuple[Any, ...]:
    """One value a line. Not splitlines: JSON's strings may hold what that takes for the end of a line (U+2028)."""
    return tuple(json.loads(line) for line in text.split("\n") if line.strip())


def _as_text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def extract_program(response: str, think: Think = "auto") -> str | None:
    """The last closed Python (or unnamed) code fence after the thinking; None where there is none."""
    text = after_thinking(response, think)
    found, opened = None, None
    for fence in _FENCE.finditer(text or ""):
        if opened is None:
            opened = fence
        else:
            if opened["language"].lower() in _PYTHON:
                found = (text or "")[opened.end() + 1 : fence.start()]
            opened = None
    return found if found and found.strip() else None


def judge(program: str, problem: CodeTests, sandbox: Sandbox) -> Verdict:
    """Run the cases in order, up to the first failure: each in a process of its own, with the limits for itself."""
    total = len(problem.cases)
    for passed, case in enumerate(problem.cases):
        if isinstance(case, CallCase):
            run = sandbox.run_calls(program, problem.function or "", [case.arguments])
            returned = run.results.splitlines()
            right = len(returned) == 1 and _same_json(returned[0], case.expected)
        else:
            run = sandbox.run_script(program, case.stdin.encode())
            right = same_output(run.stdout.decode("utf-8", "replace"), case.stdout)
        if not _ended_well(run):
            return Verdict(passed, total, _trouble(run))
        if not right:
            return Verdict(passed, total, "wrong answer")
    return Verdict(total, total, "passed")


def _ended_well(run: ProgramRun) -> bool:
    return run.status == "exited" and run.code == 0


def _trouble(run: ProgramRun) -> str:
    return run.status if run.status in ("timeout", "output") else "error"


def same_output(printed: str, expected: str) -> bool:
    """Line by line, without regard to space at the ends of lines and empty lines at both ends; where a line differs,
    word by word, and numbers by their exact value (1.50 is 1.5, 0.30000000000000004 is not 0.3)."""
    ours, theirs = printed.strip().splitlines(), expected.strip().splitlines()
    return len(ours) == len(theirs) and all(_same_line(a, b) for a, b in zip(ours, theirs))


def _same_line(ours: str, theirs: str) -> bool:
    if ours.rstrip() == theirs.rstrip():
        return True
    a, b = ours.split(), theirs.split()
    return len(a) == len(b) and all(x == y or _same_number(x, y) for x, y in zip(a, b))


def _same_number(ours: str, theirs: str) -> bool:
    if len(ours) > 100 or not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,3})?", theirs, re.IGNORECASE):
        return False
    try:
        return Decimal(ours) == Decimal(theirs)
    except InvalidOperation:
        return False


def _same_json(line: bytes, expected: Any) -> bool:
    try:
        return _same_value(json.loads(line), json.loads(json.dumps(expected)))
    except (ValueError, RecursionError):
        return False


def _same_value(ours: Any, theirs: Any) -> bool:
    """Equal as JSON: true is not 1, 1.0 is 1."""
    if isinstance(theirs, list) and isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(_same_value, ours, theirs))
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(_same_value(ours[key], theirs[key]) for key in theirs)
    return isinstance(ours, bool) == isinstance(theirs, bool) and ours == theirs


class CodeScorer:
    """1 for a program that passes every case. SandboxError, when it is made, on a machine without a safe sandbox."""

    def __init__(
        self, limits: Limits | None = None, unsafe_code_exec: bool = False, workers: int = 4, think: Think = "auto"
    ) -> None:
        self.sandbox, self.workers, self.think = Sandbox(limits, unsafe_code_exec), workers, think

    def score_many(self, pairs: Sequence[tuple[str, Any]]) -> list[Score]:
        problems = [parse_problem(label) for _, label in pairs]
        with ThreadPoolExecutor(self.workers, thread_name_prefix="sandbox") as pool:
            return list(pool.map(self._score, (response for response, _ in pairs), problems))

    def _score(self, response: str, problem: CodeTests) -> Score:
        program = extract_program(response, self.think)
        if program is None:
            return Score(0.0, None, "no answer")
        verdict = judge(program, problem, self.sandbox)
        return Score(float(verdict.outcome == "passed"), program, verdict.outcome)

    def close(self) -> None:
        """Nothing to end: no run outlives its call."""
