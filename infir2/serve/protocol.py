"""Requests as the OpenAI API writes them, checked: what cannot be honoured is refused, never dropped without a word.

Beyond OpenAI's fields there are those of other engines' servers that this one can honour: ``top_k``, ``ignore_eos``,
``stop_token_ids``, ``skip_special_tokens``, ``return_token_ids``.
"""

from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import ConfigDict, Field

from infir2.errors import did_you_mean
from infir2.serve.errors import ApiError

MOST_TOP_LOGPROBS = 20
# Fields that ask for what this server does not do, and the values with which they ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,), "length_penalty": (1,),
    "min_p": (0,), "logit_bias": ({},), "response_format": ({"type": "text"},), "tools": ([],), "functions": ([],),
    "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "function_call": ("none", "auto"),
    "modalities": (["text"],), "audio": (), "prediction": (), "reasoning_effort": (), "verbosity": (),
    "web_search_options": (), "suffix": ("",), "echo": (False,), "use_beam_search": (False,),
    "chat_template_kwargs": ({},), "min_tokens": (0,), "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,), "continue_final_message": (False,),
}  # fmt: skip
# Fields that cannot change an answer.
_WITHOUT_EFFECT = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
)  # fmt: skip


# Keys of a message whose text is not shown to the model, of an assistant's message, and lists that may be empty.
_UNSHOWN, _THOUGHTS, _LISTS = {"name"}, {"reasoning_content", "reasoning"}, {"tool_calls", "annotations"}

_Stop = Annotated[str, Field(max_length=256)]
# Of a long list of mistakes the first is told: to collect a million of them takes gigabytes and half a minute.
_FIRST = Field(fail_fast=True)


class _Checked(pydantic.BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(_Checked):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False
    continuous_usage_stats: Literal[False] = False


class TextPart(_Checked):
    type: Literal["text"]
    text: str


class Message(_Checked):
    """One message of a conversation. The content is text; in parts, they are joined."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], _FIRST]

    @pydantic.model_validator(mode="before")
    @classmethod
    def _without_what_is_not_shown(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        unshown = _UNSHOWN | (_THOUGHTS if data.get("role") == "assistant" else set())
        kept = {key: value for key, value in data.items() if not (key in unshown and isinstance(value, str))}
        # Messages that clients got from an API and send back carry keys such as "tool_calls": null or [].
        return {key: value for key, value in kept.items() if value is not None and not (key in _LISTS and value == [])}

    def plain(self) -> dict[str, str]:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class Sampling(_Checked):
    """What both routes have in common."""

    model: str
    n: Annotated[int, Field(ge=1)] = 1
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    """0 or -1 keeps all."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] = Field(default_factory=list)
    stop_token_ids: Annotated[list[int], Field(max_length=64)] = Field(default_factory=list)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False

    @pydantic.model_validator(mode="before")
    @classmethod
    def _nothing_unheard(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for key, value in data.items():
            if key in _NEUTRAL and value is not None and not any(_same(value, fine) for fine in _NEUTRAL[key]):
                fine = " or ".join(repr(value) for value in _NEUTRAL[key])
                raise ApiError(400, f"{key}: this server does not support it{f' beyond {fine}' * bool(fine)}", key)
            if value is not None and key not in _NEUTRAL and key not in _WITHOUT_EFFECT:
                kept[key] = value
        return kept

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def top_logprobs_wanted(self) -> int | None:
        """How many alternatives to report beside each token's log-probability; None: no log-probabilities."""
        raise NotImplementedError


class ChatRequest(Sampling):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def top_logprobs_wanted(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Sampling):
    """Body of /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], _FIRST]
        | Annotated[list[int], _FIRST]
        | Annotated[list[Annotated[list[int], _FIRST]], _FIRST]
    )
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    best_of: int | None = None

    @property
    def top_logprobs_wanted(self) -> int | None:
        return self.logprobs


R = TypeVar("R", bound=Sampling)


def parse(kind: type[R], body: bytes) -> R:
    """A checked request. Raises ApiError 400 that names the first field at fault."""
    try:
        request = kind.model_validate_json(body)
    except pydantic.ValidationError as error:
        raise _explained(kind, error) from None
    if isinstance(request, ChatRequest):
        if request.top_logprobs is not None and not request.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs to be true", "top_logprobs")
        both = (request.max_tokens, request.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise ApiError(400, "max_tokens and max_completion_tokens: give one of them", "max_tokens")
    if isinstance(request, CompletionRequest) and request.best_of not in (None, request.n):
        raise ApiError(400, "best_of: this server does not support it beyond n", "best_of")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options: needs stream to be true", "stream_options")
    return request


def _explained(kind: type[Sampling], error: pydantic.ValidationError) -> ApiError:
    # Of a field with several forms pydantic reports each; the one that it got furthest into is the one that was meant.
    problem = max(error.errors(include_url=False), key=lambda one: len(one["loc"]))
    if problem["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {problem['ctx']['error']}")
    if not problem["loc"]:
        return ApiError(400, "the body is not a JSON object")
    # Of a union, pydantic also names the alternative that it tried; no field is called like that.
    names = [part for part in map(str, problem["loc"]) if part != "str" and not part.startswith(("list[", "constr"))]
    where = ".".join(names)
    if problem["type"] == "extra_forbidden":
        return ApiError(400, f"{where}: unknown parameter.{did_you_mean(names[-1], kind.model_fields)}", where)
    if problem["type"] == "missing":
        return ApiError(400, f"{where}: this field is required", where)
    return ApiError(400, f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}", where)


def _same(value: Any, other: Any) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)
