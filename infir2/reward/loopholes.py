"""Answers that solve nothing and yet get full marks from reasoning-gym's scorers: "nan", any text, 1*1*4*6 for any 24.

A model finds such an answer and gives no other from then on. Runs in the worker process, beside the library's scorer.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

Entry = dict[str, Any]


def solves(dataset: str, entry: Entry, answer: str) -> bool:
    """Whether the library's scorer may judge the answer; False for one that it would be taken in by."""
    check = _CHECKS.get(dataset)
    try:
        return check is None or check(entry, answer)
    except (ArithmeticError, AttributeError, KeyError, SyntaxError, TypeError, ValueError):
        return False


def _no_nan(entry: Entry, answer: str) -> bool:
    """No distance to the right number is too large for NaN, and a list of it counts as sorted."""
    return "nan" not in answer.lower()


def _same_word(entry: Entry, answer: str) -> bool:
    """The library compares whether the two texts are empty."""
    return answer.strip().lower() == str(entry["answer"]).strip().lower()


def _near(entry: Entry, answer: str) -> bool:
    """The library gives full marks for the beginning of a number, and 0 is near enough to a small probability."""
    right = Fraction(entry["answer"])
    return abs(Fraction(answer.strip()) - right) <= min(Fraction(1, 10_000), right / 20)


def _computes(target: Callable[[Entry], int]) -> Callable[[Entry, str], bool]:
    """The entry's numbers and no others, each once, give exactly the target; the library takes any for 24, and 24.5."""

    def check(entry: Entry, answer: str) -> bool:
        from sympy import parse_expr

        numbers = sorted(map(int, re.findall(r"\d+", answer)))
        return numbers == sorted(entry["metadata"]["numbers"]) and bool(parse_expr(answer) == target(entry))

    return check


_CHECKS: dict[str, Callable[[Entry, str], bool]] = {
    "number_sorting": _no_nan,
    "complex_arithmetic": _no_nan,
    "game_of_life_halting": _same_word,
    "coin_flip": _near,
    "puzzle24": _computes(lambda entry: 24),
    "countdown": _computes(lambda entry: entry["metadata"]["target"]),
}
