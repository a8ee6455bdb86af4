r"""Answers to reasoning-gym's generated tasks, scored by the library itself: only full marks count.

The library gives partial credit, for instance ``len(oracle) / len(answer)`` to any text that contains the right answer;
a model learns to collect that, so a score below ``threshold`` (1.0) is 0, and so is what loopholes.py knows of. Some of
the library's scorers *evaluate* the answer as Python. For those, answers that are more than a plain literal or a plain
formula are turned away here, and all scoring happens in worker processes with a time limit, bounded memory, few rights.
"""

import json
import re
from collections.abc import Sequence
from importlib import util as importlib_util
from typing import Any

from infir2.errors import DataError, UserError
from infir2.reward.extract import Think, after_thinking, last_answer_line, last_boxed
from infir2.reward.score import Score
from infir2.reward.workers import WorkerPool

MAX_ANSWER = 20_000
# Data sets whose scorers call eval() on an answer that is not right as it stands. What such an answer may hold: lists
# and words; no call, attribute, element or comprehension, which could also read the right answer from the entry.
_LITERALS = {"string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "number_sorting"}
_LITERAL = re.compile(r"[\w\s,'\"\[\].+-]*")
_BEYOND_LITERALS = re.compile(r"__|\b(?:for|lambda)\b|[\w'\"\]]\s*\[|[A-Za-z_'\"\]]\s*\.")
# Formulas are read by sympy, which evaluates them with all of its own names and Python's at hand: no name but these.
_FORMULAS = {"simple_integration", "intermediate_integration", "polynomial_multiplication"}
_FORMULA = re.compile(r"[A-Za-z0-9\s+\-*/^().=]*")
_ARITHMETIC = {"puzzle24", "countdown"}
_SUM = re.compile(r"(?!.*(?:\*\s*\*|/\s*/))[0-9\s+\-*/()]*", re.DOTALL)
_FUNCTIONS = {"sin", "cos", "tan", "exp", "log", "ln", "sqrt", "asin", "acos", "atan", "sinh", "cosh", "tanh", "Abs"}
_NUMBER = re.compile(r"(?<![A-Za-z0-9])(?:0[xX][0-9a-fA-F]+|[0-9.]+(?:[eE][+-]?[0-9]+)?)")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*")
_MAX_FORMULA = 500
# Where scorers evaluate parts of the entry itself: data must not run either.
_EVALUATED_PARTS = {
    "bitwise_arithmetic": "problem", "simple_integration": "integrand", "intermediate_integration": "integrand",
    "number_sorting": "answer", "polynomial_multiplication": "answer",
}  # fmt: skip
_EXPRESSION = re.compile(r"[A-Za-z0-9\s+\-*/^().=<>&|~,\[\]'\"]*")


def is_harmless(dataset: str, answer: str) -> bool:
    """Whether the library's scorer may see this answer: always for scorers that compare text; for those that evaluate
    it, if it is a list of plain values, a sum, or a formula with known functions only."""
    if dataset in _LITERALS:
        return bool(_LITERAL.fullmatch(answer)) and not _BEYOND_LITERALS.search(answer)
    if dataset in _ARITHMETIC:
        return len(answer) <= _MAX_FORMULA and bool(_SUM.fullmatch(answer))
    if dataset in _FORMULAS:
        return len(answer) <= _MAX_FORMULA and bool(_FORMULA.fullmatch(answer)) and _has_plain_names(answer)
    return True


def _has_plain_names(text: str) -> bool:
    """Names are variables of one letter, pi and known functions, called or not: ``(eval)(x)`` is a call, too. No
    attributes."""
    names = _NAME.findall(_NUMBER.sub(" ", text))
    known = all(name in _FUNCTIONS or name == "pi" or len(name) == 1 for name in names)
    return known and not re.search(r"[A-Za-z)\]'\"]\s*\.|\.\s*[A-Za-z(]", text)


def _is_expression(text: str) -> bool:
    return bool(_EXPRESSION.fullmatch(text)) and _has_plain_names(text)


def task_answer(response: str, think: Think = "auto") -> str | None:
    r"""After the thinking: the last ``<answer>...</answer>``, else the last \boxed{...}, else the last "Answer: ...",
    else nothing. A text box around the whole answer is opened."""
    text = after_thinking(response, think)
    if text is None:
        return None
    _, opened, rest = text.rpartition("<answer>")
    if opened and "</answer>" in rest:
        return rest.partition("</answer>")[0].strip()
    boxed = last_boxed(text)
    answer = boxed if boxed is not None else last_answer_line(text)
    if answer and (inner := re.fullmatch(r"\\(?:text|mathrm)\s*\{([^{}]*)\}", answer)):
        answer = inner[1].strip()
    return answer


class ReasoningGymScorer:
    """Labels are entries as the library makes them, as objects or JSON text, with the data set's name:
    ``{"dataset": "chain_sum", "entry": {"question": ..., "answer": ..., "metadata": ...}}``, or an entry alone, whose
    metadata name their ``source_dataset``. UserError, when it is made, without the package ``reasoning-gym``."""

    def __init__(
        self, think: Think = "auto", threshold: float = 1.0, limit_s: float = 5.0, workers: int | None = None
    ) -> None:
        if importlib_util.find_spec("reasoning_gym") is None:
            raise UserError("rewards for reasoning-gym tasks need the package: pip install reasoning-gym")
        self.think, self.threshold = think, threshold
        self._pool = WorkerPool("reasoning_gym", limit_s, workers)

    def score_many(self, pairs: Sequence[tuple[str, Any]]) -> list[Score]:
        entries = [parse_entry(label) for _, label in pairs]
        answers = [task_answer(response, self.think) for response, _ in pairs]
        scores: list[Score | None] = []
        items, places = [], []
        for place, ((dataset, entry), answer) in enumerate(zip(entries, answers)):
            decided = self._decide_here(dataset, answer)
            scores.append(decided)
            if decided is None:
                items.append([dataset, entry, answer])
                places.append(place)
        for place, reply in zip(places, self._pool.run(items) if items else []):
            value = reply.get("value", 0.0)
            decided_by = next((word for word in ("timeout", "error") if word in reply), "scorer")
            scores[place] = Score(float(value >= self.threshold), answers[place], decided_by)
        return [score for score in scores if score is not None]

    def _decide_here(self, dataset: str, answer: str | None) -> Score | None:
        if answer is None:
            return Score(0.0, None, "no answer")
        if len(answer) > MAX_ANSWER:
            return Score(0.0, answer[:MAX_ANSWER], "too long")
        return None if is_harmless(dataset, answer) else Score(0.0, answer, "refused")

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()


def parse_entry(label: Any) -> tuple[str, dict[str, Any]]:
    """Data set and entry of a label. DataError for anything else."""
    try:
        data = json.loads(label) if isinstance(label, str) else label
        entry = data.get("entry", data)
        name = data.get("dataset") or entry["metadata"]["source_dataset"]
        if not isinstance(name, str) or not {"answer", "metadata"} <= entry.keys():
            raise KeyError("answer, metadata")
        if (part := _EVALUATED_PARTS.get(name)) and not _is_expression(str({**entry["metadata"], **entry}.get(part))):
            raise ValueError(f"{part} is not a plain expression")
        return name, entry
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"reasoning_gym: a label that is not an entry ({type(error).__name__}: {error}); it should read "
            '{"dataset": "chain_sum", "entry": {"question": ..., "answer": ..., "metadata": {...}}}'
        ) from None
