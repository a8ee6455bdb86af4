"""The record every reward returns, and the interface every reward has."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Score:
    """What one response earned, and why."""

    value: float
    """0 or 1; of ``python`` anything between, too."""
    answer: str | None
    """The answer as it stands in the response; None where there is none."""
    decided: str
    """How it was decided: a short word such as ``string``, ``integer``, ``symbolic``, ``timeout``, ``no answer``."""


class Scorer(Protocol):
    """A reward. ``close`` ends its worker processes; a closed scorer starts them anew when it is used again."""

    def score_many(self, pairs: Sequence[tuple[str, Any]]) -> list[Score]:
        """One score for every (response, label), in order. DataError for a label that cannot be used."""
        ...

    def close(self) -> None: ...
