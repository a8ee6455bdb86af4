"""Tokens to text while they arrive: complete characters only, at a cost that does not grow with the text."""

from typing import Any

_INCOMPLETE = "\ufffd"
_PATIENCE = 64
"""Tokens after which an incomplete character is taken for what it is: bytes that are no text."""


def decode(tokenizer: Any, tokens: list[int], skip_special_tokens: bool) -> str:
    """Exact text of the tokens: spaces are left as they are."""
    return tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


class IncrementalText:
    """The text of a growing list of tokens.

    Tokens are decoded together with a few before them, because some tokenizers write the first token of a text
    differently. Bytes of an unfinished character are held back until the tokens that finish it arrive.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._context: list[int] = []  # tokens whose text is out
        self._pending: list[int] = []  # tokens whose text is not
        self.text = ""

    def push(self, token: int) -> str:
        """Add a token; returns what it adds to ``text``, possibly nothing."""
        self._pending.append(token)
        piece = self._decode_pending()
        if piece.endswith(_INCOMPLETE) and len(self._pending) < _PATIENCE:
            return ""
        return self._emit(piece)

    def flush(self) -> str:
        """Nothing more will come: what was held back, broken characters as U+FFFD."""
        return self._emit(self._decode_pending()) if self._pending else ""

    def _decode_pending(self) -> str:
        before = decode(self._tokenizer, self._context, self._skip)
        return decode(self._tokenizer, self._context + self._pending, self._skip)[len(before) :]

    def _emit(self, piece: str) -> str:
        if piece:
            self._context = self._pending
        elif len(self._context) < _PATIENCE:  # of endless tokens without text the later ones are forgotten
            # A skipped special token has no text: what is before it still decides how the next token is written.
            self._context = self._context + self._pending
        self._pending = []
        self.text += piece
        return piece
