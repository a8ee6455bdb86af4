r"""Multiple choice: which letter does a response choose?

Precedence, after the thinking: the last \boxed{C}; the last line with "Answer: C"; the last "the answer is (C)" or
"option C". A statement that names no letter is passed over for the next kind; one that names several means no answer.
"""

import re
from collections.abc import Sequence
from typing import Any

from infir2.errors import DataError
from infir2.reward.extract import Think, after_thinking, last_answer_line, last_boxed
from infir2.reward.score import Score

AMBIGUOUS = "ambiguous"
_WRAPPING = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mathsf)\b|\\[()\[\]]|[${}*\\_`]")
_PROSE = re.compile(
    r"(?i:\b(?:answer|choice)\s{1,4}is|\boption)\s{0,4}:?\s{0,4}"
    r"(?:(?i:option|choice)\s{1,4})?(?:\*\*|\$)?(?:\\text\s?\{|\\boxed\s?\{)?[(\[]?(?P<letter>[A-Z])(?![A-Za-z0-9'])"
)


def chosen_letter(response: str, letters: str = "ABCD", think: Think = "auto") -> str | None:
    """The letter chosen, in upper case; AMBIGUOUS for a statement with several; None where there is none."""
    text = after_thinking(response, think)
    if text is None:
        return None
    for statement in (last_boxed(text), last_answer_line(text)):
        letter = _letter_of(statement, letters) if statement else None
        if letter:
            return letter
    prose = [match["letter"] for match in _PROSE.finditer(text) if match["letter"] in letters]
    return prose[-1] if prose else None


def _letter_of(statement: str, letters: str) -> str | None:
    """The one letter that a statement names: alone ("c", "(C)"), or first with its text behind it ("C) blue")."""
    plain = _WRAPPING.sub(" ", statement[:1000]).strip()
    alone = re.fullmatch(r"[(\[]?\s*([A-Za-z])\s*[)\].:]?\.?", plain)
    if alone:
        return alone[1].upper() if alone[1].upper() in letters else None
    named = set(re.findall(rf"(?<![A-Za-z0-9'])[(\[]?([{letters}])[)\].:]?(?![A-Za-z0-9'])", plain))
    if len(named) > 1:
        return AMBIGUOUS
    first = re.match(rf"(?:[Oo]ption\s+)?[(\[]?([{letters}])(?:[)\].:,]|\s*$|\s+[-–(])", plain)
    return first[1] if first else None


class ChoiceScorer:
    """1 for the right letter. Labels are letters, in brackets or not."""

    def __init__(self, letters: str = "ABCD", think: Think = "auto") -> None:
        if not letters.isalpha() or not letters.isupper():
            raise ValueError(f"letters must be capital letters, not {letters!r}")
        self.letters, self.think = letters, think

    def score_many(self, pairs: Sequence[tuple[str, Any]]) -> list[Score]:
        return [self._score(response, label) for response, label in pairs]

    def _score(self, response: str, label: Any) -> Score:
        gold = str(label).strip().strip("().").upper()
        if len(gold) != 1 or gold not in self.letters:
            raise DataError(f"multiple choice: the label {label!r} is none of the letters {self.letters}")
        letter = chosen_letter(response, self.letters, self.think)
        if letter is None or letter == AMBIGUOUS:
            return Score(0.0, None, letter or "no answer")
        return Score(float(letter == gold), letter, "letter")

    def close(self) -> None:
        """Nothing to end."""
