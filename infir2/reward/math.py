r"""Math answers: find the final answer, compare it with the label.

In this order: equal after normalisation (``string``); both whole numbers (``integer``); else math-verify decides
(``symbolic``) in worker processes that are killed at a time limit (``timeout``). An answer that writes down the
computation instead of its result earns nothing (``unevaluated``): for a whole-number label the answer has to be that
number, so ``2^{10}`` is not 1024, and for other labels it must not hold an integral, sum, limit, factorial and the like
that the label does not hold.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from infir2.errors import DataError
from infir2.reward.extract import Think, after_thinking, final_answer, last_boxed
from infir2.reward.score import Score
from infir2.reward.units import is_unit
from infir2.reward.workers import WorkerPool

MAX_ANSWER = 1000
"""Characters of an answer that is compared as a string; longer ones earn nothing."""
MAX_SYMBOLIC = 300
"""Characters of an answer that is given to math-verify."""

_INTEGER = re.compile(r"([+-]?)0*(\d+)(?:\.0*)?")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_UNEVALUATED = re.compile(
    r"\\(?:int|sum|prod|lim|binom|dbinom|tbinom|det|gcd|lcm|max|min)(?![a-zA-Z])|!|\\[bp]mod(?![a-zA-Z])"
)
_BOX = r"\\(?:text|textbf|textit|mathrm|mathbf|mathsf|operatorname|mbox)\s*\{([^{}]*)\}"
_SPACE = r"(?:(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|~|\s)"
_SPACES = re.compile(f"{_SPACE}+")
_POWER = r"(?:\^\{?[23]\}?|[²³])?"
_BOXED_UNIT = re.compile(rf"(?<=[\d}}]){_SPACE}*{_BOX}{_POWER}{_SPACE}*\Z")
_WORDS = r"[a-zA-Z]{2,}(?:[ ./-]+[a-zA-Z]+)*"
_PLAIN_UNIT = re.compile(rf"([+-]?{_SPACE}*\.?\d[\d.,]*){_SPACE}*({_WORDS}|(?<![\d.])[a-z]){_POWER}")
_ENDS = re.compile(rf"\A{_SPACE}+|(?:{_SPACE}|\.)+\Z")
_SPACED_COMMA = re.compile(rf"\d{_SPACE}*,{_SPACE}+\d|\d{_SPACE}+,")
_SPACED_DIGITS = re.compile(rf"\d+(?:{_SPACE}+\d+)+")
_SPACED_THOUSANDS = re.compile(r"\d{1,3}(?: \d{3})+")
_SIZES = re.compile(r"\\(?:left|right|bigl|bigr|Bigl|Bigr|big|Big|displaystyle)(?![a-zA-Z])\.?")
_NUMBER, _FACTORS = re.compile(r"[+-]?[\d.,]+"), re.compile(r"[+-]?[\d.,]+[a-zA-Z].*")
_ASSIGNED = re.compile(rf"[a-zA-Z](?:_\{{?\w\}}?)?{_SPACE}*={_SPACE}*(?=[^=]+\Z)")


def normalize(answer: str) -> str:
    r"""One spelling for what LaTeX spells in several ways: delimiters, spaces, ``\left``, ``\dfrac``, text boxes, units
    behind a number, signs of degree, percent and dollar, ``x =`` in front, thousands separators, a final full stop."""
    text = re.sub(r"(?<!\\)\\!", "", clean(answer))
    if (unit := _BOXED_UNIT.search(text)) and is_unit(_SPACES.sub(" ", unit[1])):
        text = text[: unit.start()]
    text = re.sub(_BOX, r"\1", text)
    text = re.sub(r"\^\{?\\circ\}?|\\degree(?![a-zA-Z])|°|\\?%", "", text)
    text = _SPACED_DIGITS.sub(_joined_thousands, _ENDS.sub("", text))
    text = _ASSIGNED.sub("", text, count=1) if _ASSIGNED.match(text) else text
    if (unit := _PLAIN_UNIT.fullmatch(text)) and is_unit(unit[2]):
        text = unit[1]
    plain = _SPACES.sub(_kept_space, text)
    if _THOUSANDS.fullmatch(plain) and not _SPACED_COMMA.search(text):  # "12, 345" is two numbers
        return plain.replace(",", "")
    return plain


def _joined_thousands(match: re.Match[str]) -> str:
    """12 345 is a number, 3 4 is two."""
    digits = _SPACES.sub(" ", match[0])
    return digits.replace(" ", "") if _SPACED_THOUSANDS.fullmatch(digits) else digits


def _kept_space(match: re.Match[str]) -> str:
    """Space means nothing, except between digits."""
    before, behind = match.string[: match.start()][-1:], match.string[match.end() :][:1]
    return " " if before.isdigit() and behind.isdigit() else ""


def same_integer(label: str, answer: str) -> bool | None:
    """Whether two normalised texts are the same whole number; None unless both are whole numbers (``34.0`` is one)."""
    first, second = _INTEGER.fullmatch(label), _INTEGER.fullmatch(answer)
    if not first or not second:
        return None
    zero = first[2] == "0"
    return first[2] == second[2] and (zero or (first[1] == "-") == (second[1] == "-"))


def clean(answer: str) -> str:
    r"""What math-verify gets to see: no delimiters, dollar signs and sizes of brackets; ``\dfrac`` is ``\frac``."""
    text = answer.strip()
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]"), ("$$", "$$"), ("$", "$")):
        if len(text) > len(opening + closing) and text.startswith(opening) and text.endswith(closing):
            text = text[len(opening) : -len(closing)].strip()
    text = text.replace("\\$", "").replace("$", "").replace("{,}", ",").replace("−", "-")
    return _SIZES.sub("", re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text))


@dataclass(frozen=True)
class _Question:
    """What is left for math-verify: the place in the batch, and the two texts."""

    place: int
    label: str
    answer: str


class MathScorer:
    """Scores math answers. Symbolic comparisons run in ``workers`` processes, each at most ``limit_s`` seconds.

    ``think``: see extract.py. ``integer_labels="symbolic"`` also accepts expressions for whole-number labels.
    """

    def __init__(
        self,
        think: Think = "auto",
        limit_s: float = 3.0,
        workers: int | None = None,
        integer_labels: Literal["strict", "symbolic"] = "strict",
    ) -> None:
        self.think, self.integer_labels = think, integer_labels
        self._pool = WorkerPool("math", limit_s, workers)

    def score_many(self, pairs: Sequence[tuple[str, Any]]) -> list[Score]:
        """One score for every (response, label), in order. Equal questions are computed once."""
        scores: list[Score | None] = []
        open_questions: list[_Question] = []
        for place, (response, label) in enumerate(pairs):
            decided = self._decide(response, label_text(label))
            scores.append(decided if isinstance(decided, Score) else None)
            if not isinstance(decided, Score):
                open_questions.append(_Question(place, *decided))
        distinct = list(dict.fromkeys((q.label, q.answer) for q in open_questions))
        found = dict(zip(distinct, self._pool.run(distinct) if distinct else []))
        for question in open_questions:
            reply = found[question.label, question.answer]
            decided_by = "timeout" if "timeout" in reply else "symbolic"
            answer = final_answer(pairs[question.place][0], self.think)
            scores[question.place] = Score(float(reply.get("value") is True), answer, decided_by)
        return [score for score in scores if score is not None]

    def _decide(self, response: str, label: str) -> Score | tuple[str, str]:
        """The score, or the two texts that are left to compare."""
        answer = final_answer(response, self.think)
        if answer is None:
            return Score(0.0, None, "truncated" if after_thinking(response, self.think) is None else "no answer")
        if len(answer) > MAX_ANSWER:
            return Score(0.0, answer[:MAX_ANSWER], "too long")
        ours, theirs = normalize(answer), normalize(label)
        if ours == theirs and ours:
            return Score(1.0, answer, "string")
        same = same_integer(theirs, ours)
        if same is not None:
            return Score(float(same), answer, "integer")
        if any(_NUMBER.fullmatch(a) and _FACTORS.fullmatch(b) for a, b in ((ours, theirs), (theirs, ours))):
            return Score(0.0, answer, "string")  # math-verify would take any letters behind a number for a unit
        strict = self.integer_labels == "strict" and _INTEGER.fullmatch(theirs)
        if strict or (_UNEVALUATED.search(ours) and not _UNEVALUATED.search(theirs)):
            return Score(0.0, answer, "unevaluated" if re.search(r"\d", ours) else "string")
        if not ours or len(answer) > MAX_SYMBOLIC or len(label) > MAX_SYMBOLIC:
            return Score(0.0, answer, "too long" if ours else "no answer")
        return clean(label), clean(answer)

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()


def label_text(label: Any) -> str:
    r"""A label as text: a number or a string, \boxed or not. DataError for anything else or nothing."""
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        raise DataError(f"math: a label must be a string or a number, not {type(label).__name__}")
    text = str(label).strip()
    boxed = last_boxed(text)
    text = boxed if boxed is not None else text
    if not text:
        raise DataError("math: an empty label")
    return text
