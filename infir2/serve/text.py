"""Tokens to the pieces of text that a streaming client gets: nothing that a stop string might still take back."""

from typing import Any

from infir2.rollout.records import TokenEvent
from infir2.rollout.text import IncrementalText


class PieceStream:
    """The text of one sample, in pieces. Together they are ``Completion.text``, cut before a stop string."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], skip_special_tokens: bool) -> None:
        self._text = IncrementalText(tokenizer, skip_special_tokens)
        self._stop = stop
        self._held = ""  # decoded, but possibly the beginning of a stop string

    def push(self, event: TokenEvent) -> str:
        """What the client may see now, possibly nothing."""
        if event.completion is not None:
            return (event.completion.text or "")[len(self._text.text) - len(self._held) :]
        self._held += self._text.push(event.token_id)
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        piece, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
