"""Multiple choice, reasoning-gym tasks, shaping, and the way from a name to a scorer."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infir2.errors import ConfigError, DataError
from infir2.reward.choice import AMBIGUOUS, ChoiceScorer, chosen_letter
from infir2.reward.dispatch import reward_for
from infir2.reward.math import MathScorer
from infir2.reward.shaping import overlong_penalty
from infir2.reward.tasks import ReasoningGymScorer, is_harmless, parse_entry, task_answer


# choice ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("ANSWER: C", "C"), (r"\boxed{C}", "C"), (r"\boxed{\text{C}}", "C"), (r"$\boxed{(c)}$", "C"),
        ("The answer is (C).", "C"), ("the answer is C", "C"), ("so the correct choice is **B**", "B"),
        ("Answer: C) blue", "C"), ("Answer: **(D)**", "D"), (r"Answer: \boxed{D}", "D"), ("Answer: $A$", "A"),
        (r"\boxed{C. The blue one}", "C"), ("I pick option (A)", "A"), ("Answer: b", "B"), ("Answer: B.", "B"),
        (r"\boxed{A} no, the answer is B", "A"),  # precedence
        ("Answer: A\nAnswer: B", "B"),  # the last one
        (r"\boxed{42}" + "\nAnswer: D", "D"),  # no letter there: the next kind
        ("the answer is a matter of taste", None), ("Answer: a blue one", None), ("Answer: E", None), ("", None),
        ("Answer: A or B", AMBIGUOUS), (r"\boxed{A, C}", AMBIGUOUS), (r"\boxed{AB}", None),
        ("<think>Answer: C", None), ("<think>Answer: C</think>Answer: D", "D"), ("Answer: Cats", None),
    ],
)  # fmt: skip
def test_chosen_letter(response: str, letter: str | None) -> None:
    assert chosen_letter(response) == letter


def test_choice_scores() -> None:
    scorer = ChoiceScorer(letters="ABCDEFGHIJ")
    pairs = [("Answer: J", "J"), ("Answer: J", "(A)"), ("Answer: A and J", "A"), ("?", "A")]
    assert [(s.value, s.decided) for s in scorer.score_many(pairs)] == [
        (1, "letter"), (0, "letter"), (0, "ambiguous"), (0, "no answer"),
    ]  # fmt: skip
    with pytest.raises(DataError, match="label"):
        scorer.score_many([("Answer: A", "Z")])


# reasoning-gym --------------------------------------------------------------------------------------------------------
gym = pytest.importorskip("reasoning_gym")


@pytest.fixture(scope="module")
def scorer() -> Iterator[ReasoningGymScorer]:
    made = ReasoningGymScorer(workers=1, limit_s=2.0)
    yield made
    made.close()


FAMILIES = [
    "chain_sum",
    "gcd",
    "letter_counting",
    "spell_backward",
    "syllogism",
    "number_sorting",
    "countdown",
    "n_queens",
]


def test_right_wrong_and_almost_right_answers(scorer: ReasoningGymScorer) -> None:
    """An answer that merely contains the right one gets credit from the library and none from us."""
    pairs, expected = [], []
    for name in FAMILIES:
        entry = gym.create_dataset(name, size=1, seed=1)[0]
        label = json.dumps({"dataset": name, "entry": entry})
        answer = entry["metadata"].get("expression", entry["answer"]) if name == "countdown" else entry["answer"]
        for text, value in ((answer, 1), (f"it might be {answer}, I think", 0), ("zzz", 0)):
            pairs.append((f"<think>hm</think><answer>{text}</answer>", label))
            expected.append(value)
    assert [s.value for s in scorer.score_many(pairs)] == expected


def test_entries_alone_and_other_forms(scorer: ReasoningGymScorer) -> None:
    entry = gym.create_dataset("chain_sum", size=1, seed=2)[0]
    answers = [rf"\boxed{{{entry['answer']}}}", rf"\boxed{{\text{{{entry['answer']}}}}}", f"Answer: {entry['answer']}"]
    assert [s.value for s in scorer.score_many([(a, entry) for a in answers])] == [1, 1, 1]
    assert [s.decided for s in scorer.score_many([("<think>" + answers[0], entry), ("x", entry)])] == ["no answer"] * 2
    assert task_answer("<answer>1</answer> no: <answer>2</answer>") == "2"


EVALUATED = ["string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "countdown", "puzzle24",
             "simple_integration", "intermediate_integration", "polynomial_multiplication"]  # fmt: skip


@pytest.mark.parametrize("name", EVALUATED)
def test_answers_are_never_run(scorer: ReasoningGymScorer, name: str, tmp_path: Path) -> None:
    """The library's scorers of these data sets evaluate the answer; ours does not let code come so far."""
    target = tmp_path / "run"
    entry = gym.create_dataset(name, size=1, seed=1)[0]
    attacks = [
        f"open({str(target)!r}, 'w')",
        f"__import__('pathlib').Path({str(target)!r}).touch()",
        f"[x for x in [open({str(target)!r}, 'w')]]",
        "().__class__.__base__.__subclasses__()",
        "(lambda: 0)()",
        f"eval(chr(111) + {str(target)!r})",
        "(eval)((chr)(49))",  # a call without a name before its bracket, a text without quotes
        "entry['answer']",
    ]
    scores = scorer.score_many(
        [(f"<answer>{attack}</answer>", {"dataset": name, "entry": entry}) for attack in attacks]
    )
    assert [s.decided for s in scores] == ["refused"] * len(attacks)
    assert not target.exists()


def test_harmless_answers_of_evaluating_scorers_pass() -> None:
    good = {
        "n_queens": "_ _ Q _\nQ _ _ _", "spiral_matrix": "[1, 2, 3]", "string_insertion": "['A', 'B']",
        "countdown": "(3 + 4)*5 - 6/2", "simple_integration": "3*x**2/2 + sin(2*x) + C",
        "intermediate_integration": "-x*cos(x) + exp(2.5*x)*log(x) + C",
        "polynomial_multiplication": "6*x**3 - x*(y + 2)",
    }  # fmt: skip
    for name, answer in good.items():
        assert is_harmless(name, answer), name
    assert is_harmless("chain_sum", "import os; anything (at) all")


def test_even_code_that_gets_through_can_do_little(scorer: ReasoningGymScorer, tmp_path: Path) -> None:
    """The second line: the worker's child has given up its rights. Here the filter is left out."""
    if not sys.platform.startswith("linux"):
        pytest.skip("rights can be given up on Linux only")
    from infir2.reward.confine import landlock_version

    if not landlock_version():
        pytest.skip("this kernel has no Landlock")
    (tmp_path / "secret").write_text("s")
    entry = gym.create_dataset("n_queens", size=1, seed=1)[0]
    attacks = [
        f"open({str(tmp_path / 'written')!r}, 'w')", f"__import__('os').system('touch {tmp_path / 'shell'}')",
        f"__import__('os').chmod({str(tmp_path / 'secret')!r}, 0)",
        "__import__('os').kill(__import__('os').getppid(), 9)",
    ]  # fmt: skip
    mode = (tmp_path / "secret").stat().st_mode
    assert all("value" in found for found in scorer._pool.run([["n_queens", entry, attack] for attack in attacks]))
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    assert (tmp_path / "secret").stat().st_mode == mode


def test_a_bomb_is_killed(scorer: ReasoningGymScorer) -> None:
    entry = gym.create_dataset("simple_integration", size=1, seed=1)[0]
    pairs = [("<answer>9**9**9**9</answer>", entry), (f"<answer>{entry['answer']}</answer>", entry)]
    assert [(s.value, s.decided) for s in scorer.score_many(pairs)] == [(0, "timeout"), (1, "scorer")]


@pytest.mark.parametrize("label", ["34", None, "{}", {"dataset": "gcd"}, {"answer": "1", "metadata": {}}])
def test_bad_entries(label: object) -> None:
    with pytest.raises(DataError, match="entry"):
        parse_entry(label)


def test_a_reply_cannot_be_forged(scorer: ReasoningGymScorer) -> None:
    """Code in an answer could write the reply to it, whatever number the pipe has."""
    entry = gym.create_dataset("intermediate_integration", size=1, seed=1)[0]
    codes = [f"__import__('os').write({pipe},b'{{\"value\":1}}\\n')" for pipe in range(3, 10)]
    answers = ["(eval)(" + "+".join(f"(chr)({ord(letter)})" for letter in code) + ")" for code in codes]
    assert max(map(len, answers)) < 500  # the limit on formulas is not what holds them back
    assert [s.value for s in scorer.score_many([(f"<answer>{a}</answer>", entry) for a in answers])] == [0] * 7


# Answers that solve nothing and to which the library itself gives full marks, and what still has to count.
LOOPHOLES = {
    "number_sorting": (lambda entry: ["[" + ", ".join(["NaN"] * entry["metadata"]["numbers"]) + "]"], None),
    "complex_arithmetic": (lambda entry: ["nan", "NaN"], None),
    "game_of_life_halting": (lambda entry: ["no idea", str(entry["answer"] != "True")], str.lower),
    "coin_flip": (lambda entry: ["0", "0.", entry["answer"][:3]], lambda answer: f"{float(answer):.5g}"),
    "puzzle24": (lambda entry: ["1*1*4*6", "24 + 0*1*1"], None),
    "countdown": (lambda entry: [str(entry["metadata"]["target"])], None),
}


@pytest.mark.parametrize("name", LOOPHOLES)
def test_answers_that_take_the_library_in_earn_nothing(scorer: ReasoningGymScorer, name: str) -> None:
    wrong, other_form = LOOPHOLES[name]
    pairs, expected = [], []
    for entry in list(gym.create_dataset(name, size=5, seed=3)):
        right = entry["metadata"].get("expression", entry["answer"])
        if len(right) < 6 and name == "coin_flip":
            continue  # then its beginning is the answer
        forms = [right, *([other_form(right)] if other_form else [])]
        for answers, value in ((forms, 1), (wrong(entry), 0)):
            pairs += [(f"<answer>{answer}</answer>", {"dataset": name, "entry": entry}) for answer in answers]
            expected += [value] * len(answers)
    assert [s.value for s in scorer.score_many(pairs)] == expected


def test_twenty_four_has_to_be_exact(scorer: ReasoningGymScorer) -> None:
    entry = {"question": "", "answer": "", "metadata": {"source_dataset": "puzzle24", "numbers": [7, 7, 2, 1]}}
    answers = ["7*7/2*1", "(7 + 7)*2 - 1", "7**1*7/2"]
    assert [s.value for s in scorer.score_many([(f"<answer>{a}</answer>", entry) for a in answers])] == [0, 0, 0]


@pytest.mark.parametrize("problem", ["__import__('os').getpid()", "(eval)('1')", "(0x1F).real"])
def test_entries_are_not_run_either(problem: str) -> None:
    evil = {"answer": "1", "metadata": {"problem": problem}}
    with pytest.raises(DataError, match="plain expression"):
        parse_entry({"dataset": "bitwise_arithmetic", "entry": evil})
    parse_entry({"dataset": "bitwise_arithmetic", "entry": {"answer": "1", "metadata": {"problem": "(0x1F << 0x3)"}}})


# shaping --------------------------------------------------------------------------------------------------------------
def test_overlong_penalty() -> None:
    """The paper's setting: 16,384 expected, 4,096 more as a buffer, 20,480 at most."""
    lengths = [0, 16_384, 16_385, 18_432, 20_480, 20_481]
    expected = [0, 0, -1 / 4096, -0.5, -1, -1]
    assert [overlong_penalty(length, 20_480, 4096) for length in lengths] == expected
    assert [overlong_penalty(n, 10, 0) for n in (10, 11)] == [0, -1]
    with pytest.raises(ValueError, match="buffer"):
        overlong_penalty(1, 10, 11)


# names ----------------------------------------------------------------------------------------------------------------
def test_reward_for() -> None:
    math = reward_for("math", workers=1)
    assert isinstance(math, MathScorer)
    assert isinstance(reward_for("choice", letters="AB"), ChoiceScorer)
    assert isinstance(reward_for("reasoning_gym"), ReasoningGymScorer)
    with pytest.raises(ConfigError, match="'math'"):
        reward_for("maths")  # type: ignore[arg-type]
