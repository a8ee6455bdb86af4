"""Answers as the OpenAI API writes them: whole, or in chunks; for chats and for plain completions.

Log-probabilities are those of the model at temperature 1 over its whole vocabulary, whatever the request samples with:
so they can be compared with the alternatives beside them. A final stop token is counted but not shown.
"""

import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from infir2.rollout.records import Completion, TokenEvent
from infir2.rollout.text import decode

Kind = Literal["chat", "text"]
_OBJECTS = {"chat": ("chat.completion", "chat.completion.chunk"), "text": ("text_completion", "text_completion")}


class Answer:
    """The frame of one HTTP request's answer, and how its choices are written."""

    def __init__(self, kind: Kind, model: str, tokenizer: Any, top: int | None, return_token_ids: bool) -> None:
        self.kind, self.top, self.return_token_ids = kind, top, return_token_ids
        self._tokenizer = tokenizer
        self._names: dict[int, str] = {}
        prefix = "chatcmpl" if kind == "chat" else "cmpl"
        self._frame = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._frame, "object": _OBJECTS[self.kind][0], "choices": choices, "usage": usage}

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None, with_usage: bool) -> dict[str, Any]:
        frame = {**self._frame, "object": _OBJECTS[self.kind][1], "choices": choices}
        return {**frame, "usage": usage} if with_usage else frame

    def choice(self, index: int, completion: Completion, events: Sequence[TokenEvent]) -> dict[str, Any]:
        """A finished sample; ``events`` are its tokens but for a final stop token."""
        content: dict[str, Any]
        if self.kind == "chat":
            content = {"message": {"role": "assistant", "content": completion.text or "", "refusal": None}}
        else:
            content = {"text": completion.text or ""}
        return self._choice(index, content, events, 0, completion)

    def opening(self, index: int) -> dict[str, Any]:
        """The first chunk of a chat's choice."""
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def piece(
        self, index: int, text: str, events: Sequence[TokenEvent], offset: int, completion: Completion | None
    ) -> dict[str, Any]:
        """A chunk of a choice. ``offset``: characters of the tokens before."""
        content = {"delta": {"content": text}} if self.kind == "chat" else {"text": text}
        return self._choice(index, content, events, offset, completion)

    def length(self, events: Sequence[TokenEvent]) -> int:
        """Characters of the tokens, each decoded by itself."""
        return sum(len(self._name(event.token_id)) for event in events)

    def _choice(
        self,
        index: int,
        content: dict[str, Any],
        events: Sequence[TokenEvent],
        offset: int,
        completion: Completion | None,
    ) -> dict[str, Any]:
        logprobs = None
        if self.top is not None:
            logprobs = self._chat_logprobs(events) if self.kind == "chat" else self._text_logprobs(events, offset)
        reason = completion.finish_reason if completion else None
        extra = {"token_ids": [event.token_id for event in events]} if self.return_token_ids else {}
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason, **extra}

    def _chat_logprobs(self, events: Sequence[TokenEvent]) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            name = self._name(token)
            # A token that is part of a character has no text, and its bytes cannot be told from its name.
            return {"token": name, "logprob": logprob, "bytes": None if "\ufffd" in name else list(name.encode())}

        content = [
            {**entry(event.token_id, event.raw_logprob), "top_logprobs": [entry(*other) for other in event.top]}
            for event in events
        ]
        return {"content": content, "refusal": None}

    def _text_logprobs(self, events: Sequence[TokenEvent], offset: int) -> dict[str, Any]:
        offsets = []
        for event in events:
            offsets.append(offset)
            offset += len(self._name(event.token_id))
        return {
            "tokens": [self._name(event.token_id) for event in events],
            "token_logprobs": [event.raw_logprob for event in events],
            "top_logprobs": [self._by_text(event) for event in events],
            "text_offset": offsets,
        }

    def _by_text(self, event: TokenEvent) -> dict[str, float]:
        """Log-probabilities of the alternatives and, as in OpenAI's API, of the token itself. Of tokens with the same
        text, such as parts of characters, the likeliest is told."""
        found: dict[str, float] = {}
        for token, logprob in (*event.top, (event.token_id, event.raw_logprob)):
            found[self._name(token)] = max(logprob, found.get(self._name(token), logprob))
        return found

    def _name(self, token: int) -> str:
        if token not in self._names:
            self._names[token] = decode(self._tokenizer, [token], skip_special_tokens=False)
        return self._names[token]


def usage(prompt_tokens: int, completions: Sequence[Completion]) -> dict[str, Any]:
    """``prompt_tokens``: each prompt once, however many samples it has."""
    made = sum(len(completion.token_ids) for completion in completions)
    cached = sum(completion.cached_tokens for completion in completions if completion.index == 0)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": made,
        "total_tokens": prompt_tokens + made,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
