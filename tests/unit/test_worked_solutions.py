"""Worked examples: the library's scorer marks every answer, an independent reading of the steps agrees with it."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym

from infir2 import cli
from infir2.data import worked_solutions
from infir2.data.worked_solutions import FAMILIES, WorkedExample, is_held_out, worked_examples
from infir2.errors import DataError
from infir2.reward.extract import last_boxed

COUNT = 400


def mark(example: WorkedExample, answer: str | None) -> float:
    """The library's own."""
    dataset = reasoning_gym.create_dataset(example.family, size=1, seed=0)
    return dataset.score_answer(answer=answer, entry=example.reference)


@pytest.mark.parametrize("stage", [1, 2])
def test_every_answer_verifies_and_every_step_is_true(stage: int) -> None:
    families: Counter[str] = Counter()
    checked = 0
    for example in worked_examples(stage, COUNT, seed=11):
        families[example.family] += 1
        assert example.completion.startswith("<think>\n")
        assert last_boxed(example.completion) == example.answer
        assert mark(example, example.answer) == 1.0
        assert example.steps
        for step in example.steps:
            # Every equation in a step, reckoned by Python; the columns of a sum stand between it and its result.
            columns = re.findall(r"\(([^()]*=[^()]*)\)", step)
            whole = re.sub(r"\([^()]*=[^()]*\)", "", step)
            for match in re.finditer(
                r"(-?[\d(][-\d+*/() ]*|\d+ mod \d+) ?= ?(-?\d[-\d*+ ]*)", ", ".join([whole, *columns])
            ):
                left, right = (eval(side.replace("mod", "%").strip(), {}) for side in match.groups())
                assert left == right, step
                checked += 1
    assert families.keys() == FAMILIES.keys()
    assert max(families.values()) - min(families.values()) <= 2
    print(f"stage {stage}: {COUNT} examples, {checked} equations")
    assert checked > COUNT


def test_the_columns_of_a_sum() -> None:
    """Carries and borrows are spelled out, and the result stands in the columns: its digits, from the right."""
    seen: Counter[str] = Counter()
    for example in worked_examples(2, 300, seed=4, families=["chain_sum"]):
        for step in example.steps:
            if spelled := re.fullmatch(r"(-?\d+)([-+])(\d+)\((.*)\)=(-?\d+)", step):
                left, sign, right, columns, result = spelled.groups()
                digits = [int(piece.split("=")[1]) % 10 for piece in columns.split(", ")]
                carry = int(columns.split("=")[-1]) // 10
                value = sum(digit * 10**place for place, digit in enumerate(digits)) + carry * 10 ** len(digits)
                assert value == abs(int(result)) == abs(eval(f"{left}{sign}{right}")), step
                seen[sign] += 1
    assert min(seen["+"], seen["-"]) > 100


def test_the_same_seed_gives_the_same_examples() -> None:
    first = [example.row() for example in worked_examples(1, 60, seed=5)]
    assert first == [example.row() for example in worked_examples(1, 60, seed=5)]
    assert first[:20] == [example.row() for example in worked_examples(1, 20, seed=5)], "a longer stream goes on"
    assert first != [example.row() for example in worked_examples(1, 60, seed=6)]


@pytest.mark.parametrize("stage", [1, 2])
def test_no_held_out_question_is_ever_trained_on(stage: int) -> None:
    train = {example.question for seed in (1, 2) for example in worked_examples(stage, 600, seed)}
    held_out = {example.question for seed in (1, 2) for example in worked_examples(stage, 150, seed, "held_out")}
    assert min(len(train), len(held_out)) > 100
    assert not train & held_out
    assert all(map(is_held_out, held_out))
    assert not any(map(is_held_out, train))


def test_a_family_that_is_used_up() -> None:
    made = list(worked_examples(1, 300, 1, families=["count_bits", "chain_sum"]))
    assert len({example.question for example in made}) == 300
    with pytest.raises(DataError, match=r"only \d+ of 1000 different examples exist in count_bits of stage 1"):
        list(worked_examples(1, 1000, 1, families=["count_bits"]))
    with pytest.raises(DataError, match="Did you mean 'chain_sum'"):
        list(worked_examples(1, 1, 1, families=["chainsum"]))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "stage2.jsonl"
    assert cli.main(["examples", str(out), "--stage", "2", "--count", "30", "--seed", "4"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == [example.row() for example in worked_examples(2, 30, 4)]
    assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant"]
    assert "30 examples" in capsys.readouterr().out
    assert (
        cli.main(["examples", str(out.with_name("text.jsonl")), "--form", "text", "--count", "2", "--seed", "4"]) == 0
    )
    texts = [json.loads(line)["text"] for line in out.with_name("text.jsonl").read_text().splitlines()]
    assert texts == [f"{one.question}\n{one.completion}" for one in worked_examples(1, 2, 4)]
    out.with_name("text.jsonl").unlink()
    assert cli.main(["examples", str(out), "--families", "chian_sum"]) == 2
    assert "Did you mean 'chain_sum'?" in capsys.readouterr().err
    assert [path.name for path in out.parent.iterdir()] == ["stage2.jsonl"], "an earlier file stays, no rest beside it"
    assert len(out.read_text().splitlines()) == 30


def test_a_killed_command_leaves_nothing_and_a_link_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, link = tmp_path / "real.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(real)

    def looked_at(*arguments: Any) -> Iterator[WorkedExample]:
        for example in worked_examples(*arguments):
            assert [path.name for path in tmp_path.iterdir()] == ["link.jsonl"]
            yield example

    monkeypatch.setattr(worked_solutions, "worked_examples", looked_at)
    assert cli.main(["examples", str(link), "--count", "5"]) == 0
    assert link.is_symlink()
    assert len(real.read_text().splitlines()) == 5
