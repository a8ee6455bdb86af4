"""The judge of programs: test cases and how outputs are compared, verdicts, and programs that cheat for theirs."""

import secrets
from pathlib import Path

import pytest

from infir2.errors import DataError
from infir2.reward import code
from infir2.reward.code import (
    CallCase,
    CodeScorer,
    CodeTests,
    StdioCase,
    Verdict,
    extract_program,
    judge,
    parse_problem,
    same_output,
)
from infir2.reward.sandbox import Limits, Sandbox


# test cases -----------------------------------------------------------------------------------------------------------
def test_extract_program() -> None:
    assert extract_program("a\n```python\nx = 1\n```\nb") == "x = 1\n"
    assert extract_program("```py\n1\n```\n```\n2\n```\n```text\n3\n```") == "2\n"
    assert extract_program("```python\nprint(1)") is None
    assert extract_program("<think>```python\n1\n```") is None
    assert extract_program("<think>```python\n1\n```</think>none") is None
    assert extract_program("x = 1") is None


def test_parse_problem() -> None:
    both = CodeTests((StdioCase("1", "2"),))
    assert parse_problem('{"inputs": ["1"], "outputs": ["2"]}') == both
    assert parse_problem([{"input": "1", "output": "2", "testtype": "stdin"}]) == both
    calls = CodeTests((CallCase(([1, 2], "a"), 3),), "f")
    assert parse_problem({"inputs": [[[1, 2], "a"]], "outputs": [3], "fn_name": "f"}) == calls
    rows = [{"input": '[1, 2]\n"a"', "output": "3", "testtype": "functional"}]
    assert parse_problem({"tests": rows, "fn_name": "f"}) == calls


@pytest.mark.parametrize(
    "label",
    [
        "nonsense", "{}", [], {"inputs": ["1"], "outputs": []}, {"inputs": ["1"], "outputs": [" "]}, 7, None,
        [{"input": "1", "output": "2", "testtype": "functional"}], [{"input": "1"}],
    ],
)  # fmt: skip
def test_bad_problems(label: object) -> None:
    with pytest.raises(DataError, match="code:"):
        parse_problem(label)


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("1\n2\n", "1\n2", True), ("1 \n2\n\n", "1\n2", True), ("1.50", "1.5", True), ("1  2", "1 2", True),
        ("0.30000000000000004", "0.3", False), ("1\n\n2", "1\n2", False), ("", "1", False), ("yes", "YES", False),
        ("1e400", "1", False), ("nan", "nan", True), ("NaN", "1", False), ("1" * 5000, "1", False), ("１", "1", True),
        ("\n\n1", "1", True), ("  1", "1", True), ("5", "5.", True), (".5", "0.5", True), ("5", ".", False),
    ],
)  # fmt: skip
def test_same_output(printed: str, expected: str, same: bool) -> None:
    assert same_output(printed, expected) is same


def test_json_values_are_compared_strictly() -> None:
    assert code._same_json(b"[1, 2.0]", (1, 2))
    assert not code._same_json(b"true", 1)
    assert not code._same_json(b"[" * 100_000, 1)
    assert not code._same_json(b"1" * 100_000, 1)


# verdicts -------------------------------------------------------------------------------------------------------------
PROBLEM = CodeTests((StdioCase("2\n", "4\n"), StdioCase("3\n", "9\n")))
SQUARE = "n = int(input())\nprint(n * n)"


def test_right_and_wrong_programs(sandbox: Sandbox) -> None:
    assert judge(SQUARE, PROBLEM, sandbox).outcome == "passed"
    assert judge("print(4)", PROBLEM, sandbox) == Verdict(1, 2, "wrong answer")
    assert judge(SQUARE + "\n1 / 0", PROBLEM, sandbox) == Verdict(0, 2, "error")
    assert judge("def broken(:", PROBLEM, sandbox).outcome == "error"


@pytest.mark.parametrize(
    "hack",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "import sys\nclass Yes:\n    def write(self, text): return 1\n    flush = print\nsys.stdout = Yes()\nprint(4)",
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'ended 0\\n')\n    except OSError: pass\nos._exit(0)",
        "import os\nif os.getpid() == 2:\n    os.kill(1, 9)\n    os.kill(-1, 9)",
        "import builtins, sys\nbuiltins.compile = exec = lambda *a: None\nsys.modules.clear()",
    ],
    ids=["os._exit", "sys.exit", "stdout tampered", "forged reports", "kill all", "builtins tampered"],
)
def test_no_hack_of_the_process_passes(sandbox: Sandbox, hack: str) -> None:
    assert judge(hack, PROBLEM, sandbox).outcome != "passed"


def test_expected_outputs_are_nowhere_to_be_found(sandbox: Sandbox, canary: Path) -> None:
    secret = secrets.token_hex(12)
    canary.write_text(secret)
    search = (
        "import gc, os, sys\nseen = [open(0).read()]\n"
        f"for place in [{str(canary)!r}, 'calls.json', 'program.py', '/proc/self/cmdline', '/proc/1/cmdline']:\n"
        "    try: seen.append(open(place).read())\n    except OSError: pass\n"
        "for top, _, names in os.walk('/work'):\n    for name in names: seen.append(open(top + '/' + name).read())\n"
        "frame = sys._getframe()\nwhile frame:\n    seen.append(repr(frame.f_locals)); frame = frame.f_back\n"
        "seen += [repr(o) for o in gc.get_objects() if isinstance(o, (dict, list, tuple))][:3000]\n"
        "print(sys.orig_argv, seen)"
    )
    run = sandbox.run_script(search, b"question")
    assert b"question" in run.stdout
    assert secret.encode() not in run.stdout
    assert judge(search, CodeTests((StdioCase("question", secret),)), sandbox).outcome != "passed"


def test_calls_cannot_be_hacked_either(sandbox: Sandbox) -> None:
    problem = parse_problem({"inputs": [[2], [3]], "outputs": [4, 9], "fn_name": "square"})
    assert judge("def square(n): return n * n", problem, sandbox).outcome == "passed"
    hacks = {
        "equal to all": "class Any(int):\n    def __eq__(self, other): return True\ndef square(n): return Any(1)",
        "too many results": (
            "import os\ndef square(n): return n * n\nfor fd in range(3, 64):\n"
            "    try: os.write(fd, b'4\\n9\\n')\n    except OSError: pass"
        ),
        "exit early": "import os\ndef square(n): os._exit(0)",
        "json tampered": "import json\njson.dumps = lambda value: 'true'\ndef square(n): return 1",
        "true is not one": "def square(n): return n == n",
        "missing": "def cube(n): return n ** 3",
        "endless numbers": "def square(n): return 10 ** 100000",
    }
    for name, hack in hacks.items():
        assert judge(hack, problem, sandbox).outcome != "passed", name


LCB_ACCEPTS = {
    "deep recursion": "def down(k): return k and 1 + down(k - 1)\nprint(down(20000) - 20000 + int(input()))",
    "names of modules that it did not import": "d = defaultdict(int)\nd[1] += int(sys.stdin.readline())\nprint(d[1])",
    "built-in pow and open": "print(pow(int(open(0).read()), 1, 7))",
    "an empty line in front": "print()\nprint(input())",
    "sys.exit(1) behind the output": "print(input())\nimport sys\nsys.exit(1)",
    "exit with words": "print(input())\nexit('done')",
}
LCB_ACCEPTS_CALLS = {
    "deep recursion": "def f(n):\n    def down(k): return k and 1 + down(k - 1)\n    return down(20000) - 20000 + n",
    "json and datetime": "class Solution:\n    def f(self, n): return json.loads(str(n * datetime.timedelta(1).days))",
    "names of math and operator": "def f(n): return list(accumulate([0, n], add))[-1] + int(sin(0))",
}


def test_what_livecodebench_accepts_is_accepted(sandbox: Sandbox) -> None:
    script = parse_problem([{"input": "5\n", "output": "5"}])
    calls = parse_problem({"tests": [{"input": "5", "output": "5", "testtype": "functional"}], "fn_name": "f"})
    found = {name: judge(program, script, sandbox).outcome for name, program in LCB_ACCEPTS.items()}
    assert found == dict.fromkeys(LCB_ACCEPTS, "passed")
    found = {name: judge(program, calls, sandbox).outcome for name, program in LCB_ACCEPTS_CALLS.items()}
    assert found == dict.fromkeys(LCB_ACCEPTS_CALLS, "passed")


def test_every_call_has_the_limits_for_itself() -> None:
    """Four calls, each well within the limit, all of them together not."""
    sandbox = Sandbox(Limits(wall_s=3, cpu_s=3))
    problem = parse_problem({"inputs": [[n] for n in range(4)], "outputs": list(range(4)), "fn_name": "slow"})
    source = "import time\nseen = []\ndef slow(n):\n    time.sleep(1)\n    seen.append(n)\n    return {}"
    assert judge(source.format("n"), problem, sandbox) == Verdict(4, 4, "passed")
    assert judge(source.format("n if len(seen) == 1 else -1"), problem, sandbox).outcome == "passed", "nothing is left"


def test_annotations_mean_what_python_makes_of_them(sandbox: Sandbox) -> None:
    problem = parse_problem({"inputs": [[1]], "outputs": [1], "fn_name": "f"})
    assert judge("def f(n: int) -> List[int]: return f.__annotations__['n'](n)", problem, sandbox).outcome == "passed"


def test_a_batch_is_scored_in_order(sandbox: Sandbox) -> None:
    label = '{"inputs": ["2\\n"], "outputs": ["4\\n"], "fn_name": null}'
    answers = [
        f"<think>hm</think>\n```python\n{SQUARE}\n```",
        "no program",
        "```python\nprint(5)\n```",
        "<think>```\nx",
    ]
    scores = CodeScorer(sandbox.limits, workers=4).score_many([(answer, label) for answer in answers * 2])
    assert [(s.value, s.decided) for s in scores[:4]] == [
        (1.0, "passed"), (0.0, "no answer"), (0.0, "wrong answer"), (0.0, "no answer"),
    ]  # fmt: skip
    assert scores[4:] == scores[:4]
