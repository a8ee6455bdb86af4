"""A conversation to token ids, and which of them are trained on: the assistant's turns, end-of-turn token included.

Where the turns lie comes from the chat template itself. A template with ``{% generation %}`` blocks says so; any other
is rendered up to and with each assistant message, and the difference is the turn. Templates may rewrite earlier turns
(Qwen's drop their <think> part): then each turn is trained on in the form in which the model writes it, as a sample of
its own. Templates run in transformers' sandbox and have a time limit.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from infir2.data.conversations import Conversation, Message
from infir2.data.documents import BadRow
from infir2.data.time_limit import LIMIT_S, TookTooLong, time_limit
from infir2.data.tokenizer import CHAT_TEMPLATE
from infir2.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THINK_END = "</think>"


@dataclass(frozen=True)
class Rendered:
    """One training text and the character ranges that are trained on, rising."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Sample:
    """One tokenised training text."""

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    """Which ids the model learns to predict."""


class ChatTokenizer:
    """Applies a chat template and a tokenizer. ``template`` is its Jinja text, ``named_by`` the key or option that it
    can be changed with."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", template: str, named_by: str = "data.chat_template"
    ) -> None:
        from transformers.utils.chat_template_utils import render_jinja_template

        self.template, self._named_by = template, named_by
        self.identity = [hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(), template]
        """Changes when the samples of a conversation may."""
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()  # a tokenizer.json may ask for either; both would change the samples
        self._backend.no_padding()
        self._names = dict(tokenizer.special_tokens_map)
        self._marks = bool(_GENERATION.search(template))
        self._special = _special_tokens(tokenizer)
        self._jinja: Callable[..., Any] = render_jinja_template
        try:
            self._prompt([{"role": "user", "content": "?"}], None)
        except BadRow:
            pass  # a template may insist on more than one message
        except SyntaxError as error:
            raise DataError(f"{named_by}: not a Jinja template: {error}") from None

    def render(self, conversation: Conversation) -> list[Rendered]:
        """The training texts of a conversation: one, or several where the template rewrites earlier turns.

        Every assistant turn is trained on exactly once. Raises BadRow (bad_template) where the template fails, drops a
        turn's <think> part or tool calls, or does not show where a turn begins; DataError where it does not end.
        """
        messages = conversation.messages
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        done: list[tuple[str, list[tuple[int, int]]]] = []
        for index in reversed(turns):
            text, start, end = self._turn(messages[: index + 1], conversation.tools)
            holder = next((spans for later, spans in done if later.startswith(text[:end])), None)
            if holder is None:
                done.append((text, [(start, end)]))
            else:
                holder.insert(0, (start, end))
        return [Rendered(text, tuple(spans)) for text, spans in reversed(done)]

    def encode(self, texts: Sequence[Rendered]) -> list[Sample]:
        """Token ids and masks of many texts at once (spread over threads by the tokenizers library)."""
        encodings = self._backend.encode_batch([text.text for text in texts], add_special_tokens=False)
        return [
            Sample(np.array(encoding.ids, np.int32), _trained(encoding, text.spans))
            for encoding, text in zip(encodings, texts)
        ]

    def prompt(self, messages: Sequence[Message], tools: Any = None) -> list[int]:
        """Token ids of the conversation with an assistant turn opened: what a model is asked to continue.

        Raises BadRow (bad_template) where the template refuses the messages, DataError where it does not end.
        """
        return self._backend.encode(self._prompt(messages, tools), add_special_tokens=False).ids

    def end_of_turn(self) -> int | None:
        """Id of the special token with which the template ends an assistant turn; None where it has none."""
        turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        try:
            text, start, end = self._turn(turn, None)
        except BadRow:
            return None
        ids = self._backend.encode(text[start:end], add_special_tokens=False).ids
        last = self._backend.id_to_token(ids[-1]) if ids else None
        return ids[-1] if last and self._special and self._special.fullmatch(last) else None

    def _turn(self, messages: Sequence[Message], tools: Any) -> tuple[str, int, int]:
        """The text up to and with the last message, an assistant's, and the range of that message's turn in it."""
        text, marked = self._render(messages, tools, marks=self._marks)
        if self._marks:
            if not marked:
                raise BadRow("bad_template", "its {% generation %} block is not reached")
            start, end = marked[-1]
        else:
            prompt = self._prompt(messages[:-1], tools)
            if not text.startswith(prompt):
                raise BadRow(
                    "bad_template",
                    "the template writes an assistant turn otherwise than it asks for one; mark its turns with "
                    f"{{% generation %}}, or set {self._named_by}",
                )
            start, end = len(prompt), self._end_of_turn(text, len(prompt))
        if _THINK_END in messages[-1]["content"] and _THINK_END not in text[start:end]:
            raise BadRow("bad_template", f"the template drops the <think> part; set {self._named_by}")
        for call in messages[-1].get("tool_calls", ()):
            if call["function"]["name"] not in text[start:end]:
                raise BadRow("bad_template", f"the template drops tool calls; set {self._named_by}")
        return text, start, end

    def _end_of_turn(self, text: str, start: int) -> int:
        """Behind the last special token, where only white space follows: that is the template's, not the model's."""
        found = self._special.search(text, start) if self._special else None
        end = len(text)
        while found and self._special:
            if not text[found.end() :].strip():
                end = found.end()
            found = self._special.search(text, found.end())
        return end

    def _prompt(self, messages: Sequence[Message], tools: Any) -> str:
        # Without marks, because transformers lets only one thread at a time mark; a server's requests are many.
        return self._render(messages, tools, marks=False, add_generation_prompt=True)[0]

    def _render(
        self, messages: Sequence[Message], tools: Any, marks: bool, add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        from jinja2 import TemplateSyntaxError

        try:
            with time_limit():
                texts, marked = self._jinja(
                    conversations=[list(messages)],
                    tools=tools,
                    chat_template=self.template,
                    return_assistant_tokens_mask=marks,
                    add_generation_prompt=add_generation_prompt,
                    **self._names,
                )
        except TemplateSyntaxError as error:
            raise SyntaxError(str(error)) from None
        except TookTooLong:
            raise DataError(
                f"the chat template has not ended after {LIMIT_S} seconds and may loop for ever; "
                f"set {self._named_by} to another"
            ) from None
        except Exception as error:  # a template can raise whatever its author thought of
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BadRow("bad_template", reason) from None
        return texts[0], [(int(start), int(end)) for start, end in marked[0]] if marks else []


def choose_template(tokenizer: "PreTrainedTokenizerBase", choice: str, named_by: str = "data.chat_template") -> str:
    """The Jinja text that ``named_by``, a key or an option, means: "auto", "chatml" or a file.

    Raises DataError for a file that cannot be read, and for ChatML with a tokenizer that lacks its tokens.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict):  # several, by name
        own = own.get("default")
    if choice == "auto" and own:
        return str(own)
    if choice not in ("auto", "chatml"):
        try:
            return Path(choice).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{named_by}: {choice}: cannot be read: {reason}") from None
    if missing := [token for token in ("<|im_start|>", "<|im_end|>") if token not in tokenizer.get_vocab()]:
        raise DataError(
            f"{tokenizer.name_or_path}: the tokenizer has {'no chat template and ' * (not own)}no token "
            f"{missing[0]} for ChatML; set {named_by} to a .jinja file"
        )
    return CHAT_TEMPLATE


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str] | None:
    names = {str(token) for token in tokenizer.all_special_tokens}
    names |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True)))) if names else None


def _trained(encoding: "Encoding", spans: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Tokens that hold at least one character of a span."""
    trained = np.zeros(len(encoding.ids), np.bool_)
    for start, end in spans:
        if start == end:
            continue
        # Asking for two characters is far cheaper than fetching the offsets of all tokens.
        first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
        if first is None or last is None:  # a space that the tokenizer leaves out of its offsets
            extents = _extents(encoding)
            trained |= (extents[:, 0] < end) & (extents[:, 1] > start)
            continue
        while (extent := encoding.token_to_chars(last + 1)) and extent[0] < end:  # other bytes of one character
            last += 1
        trained[first : last + 1] = True
    return trained


def _extents(encoding: "Encoding") -> NDArray[np.int64]:
    """The characters [start, end) of every token, int64 [tokens, 2].

    Byte-level tokenizers leave the spaces before a word out of its offsets; they are the word's here, so that tokens
    cover the text without gaps. Tokens that are parts of one character all have that character.
    """
    extents = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    before = np.concatenate([np.zeros(1, np.int64), extents[:-1, 1]])
    extents[:, 0] = np.minimum(extents[:, 0], before)
    return extents
