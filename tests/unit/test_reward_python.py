"""A reward of the user's own: a function in a Python file."""

import hashlib
import os
import re
from contextlib import closing
from pathlib import Path

import pytest
from pydantic import ValidationError

from infir2.config import RewardSection
from infir2.errors import ConfigError, DataError
from infir2.evaluate.local import check_labels
from infir2.evaluate.tasks import parse_tasks, problems_of
from infir2.reward.dispatch import reward_for
from infir2.reward.python_file import PythonScorer, digest
from infir2.reward.score import Score
from infir2.stages.rl import make_scorer

GRADER = """
import os, time
from beside import least
print("said while it is imported")

def score(response, label):
    if response == "slow":
        time.sleep(60)
    if response == "write":
        open(label, "w")
    if response == "pid":
        return os.getpid() == label
    print("said while it scores")
    return min(1, len(response) / least / label)
"""


@pytest.fixture
def grader(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("least = 2\n")
    (tmp_path / "grader.py").write_text(GRADER)
    return tmp_path / "grader.py"


def test_the_function_gets_the_answer_and_the_label_in_a_process_of_its_own(grader: Path) -> None:
    with closing(make_scorer(RewardSection(kind="python", file=str(grader), limit_s=0.5, workers=1))) as scorer:
        pairs = [("<think>long, long</think>ab", 2), ("abcdef", 2), ("<think>never closed", 2), ("slow", 2), ("ab", 1)]
        assert scorer.score_many(pairs) == [
            Score(0.5, None, "scorer"),
            Score(1.0, None, "scorer"),
            Score(0.0, None, "no answer"),
            Score(0.0, None, "timeout"),
            Score(1.0, None, "scorer"),
        ]
        assert scorer.score_many([("pid", os.getpid())]) == [Score(0.0, None, "scorer")]
        assert scorer.score_many([]) == []


def test_what_the_function_does_wrong_is_told_and_not_scored(grader: Path, tmp_path: Path) -> None:
    with closing(PythonScorer(str(grader))) as scorer:
        with pytest.raises(DataError, match=r"grader.py: score\(response, label\) raised ZeroDivisionError: .*zero"):
            scorer.score_many([("ab", 1), ("ab", 0)])
        with pytest.raises(DataError, match=r"returned -1.0, not a number from 0 to 1"):
            scorer.score_many([("ab", -1)])
        with pytest.raises(DataError, match="no JSON"):
            scorer.score_many([("ab", {1, 2})])
        with pytest.raises(DataError, match="PermissionError"):
            scorer.score_many([("write", str(tmp_path / "written"))])
        assert scorer.score_many([("ab", 1)]) == [Score(1.0, None, "scorer")]


def test_the_digest_sees_what_is_imported_from_the_folder_and_nothing_else(tmp_path: Path) -> None:
    files = {
        "grader.py": "import json, beside, data, broken\ndef score(response, label):\n    from package.inner import x",
        "beside.py": "import deeper",
        "deeper.py": "import grader",
        "package/__init__.py": "from . import inner",
        "package/inner.py": "x = 1",
        "broken.py": "def (",
        "other.py": "",
        "data/rows.jsonl": "{}",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    known = digest(str(tmp_path / "grader.py"))
    for name, text in files.items():
        (tmp_path / name).write_text(text + " ")
        changed = digest(str(tmp_path / "grader.py")) != known
        assert changed == (name not in ("other.py", "data/rows.jsonl")), name
        (tmp_path / name).write_text(text)
    assert digest(str(tmp_path / "grader.py")) == known
    alone = tmp_path / "other.py"
    assert digest(str(alone)) == hashlib.sha256(alone.read_bytes()).hexdigest(), "as runs have it on record"
    for link, target in (("package/.#inner.py", "me@host.1"), ("elsewhere/grader.py", tmp_path / "grader.py")):
        (tmp_path / link).parent.mkdir(exist_ok=True)
        (tmp_path / link).symlink_to(target)
    for name in ("package/._inner.py", "package/.ipynb_checkpoints/inner-checkpoint.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 2")
    assert digest(str(tmp_path / "grader.py")) == known, "what editors leave is no module"
    assert digest(str(tmp_path / "elsewhere/grader.py")) == known, "what lies beside the file is imported, not the link"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("g.py", "def scored(a, b): pass", "g.py: defines no function score(response, label)"),
        ("g.py", "\ndef score(:", "g.py:2: is not Python: invalid syntax"),
        ("g.py", None, "g.py: cannot be read: No such file or directory"),
        ("g.txt", "def score(a, b): pass", "g.txt: is not called .py"),
    ],
)
def test_a_file_without_the_function_is_refused(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        reward_for("python", file=str(tmp_path / name))


def test_the_recipe_names_the_file_with_the_kind_and_only_then() -> None:
    for section in ({"kind": "python"}, {"file": "g.py"}):
        with pytest.raises(ValidationError, match=re.escape("reward.file")):
            RewardSection(**section)


def test_a_task_of_evaluation_names_the_grader_and_the_rows(grader: Path) -> None:
    rows = grader.with_name("rows.jsonl")
    rows.write_text('{"prompt": "write four letters", "label": 2}\n')
    (task,) = parse_tasks(f"python:{grader}:{rows}")
    assert (task.grader, task.grader_file) == ("python", str(grader))  # type: ignore[union-attr]
    problems = problems_of(task, None)  # type: ignore[arg-type]
    assert [problem.label for problem in problems] == [2]
    with closing(PythonScorer(str(grader))) as scorer:
        check_labels(task, problems, scorer)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"should read python:GRADER\.py:FILE"):
        parse_tasks(f"python:{rows}")
