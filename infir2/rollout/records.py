"""What crosses the border of a rollout engine: requests in, completions out. Needs no torch."""

import math
from dataclasses import dataclass, field
from typing import Literal

from infir2.errors import UserError

FinishReason = Literal["stop", "length", "abort"]
LEAST_TEMPERATURE = 1e-5
"""Logits divided by less leave the range of float32, and long before that only the most likely token is drawn."""
LARGEST_TOP_K = 2**31 - 1
"""Far above any vocabulary. It becomes a 64-bit number of a batch: one that is too large would fail all the requests
in it."""


class RequestError(UserError):
    """A request that the engine cannot serve: what is wrong with it, and the limit it breaks."""


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of a request are chosen. Raises RequestError, naming the field, for a value out of range."""

    temperature: float = 1.0
    """Divides the logits; 0 is greedy, and so is what lies below LEAST_TEMPERATURE: it becomes 0."""
    top_p: float = 1.0
    """Keep the most likely tokens up to this probability, the one that crosses it included. Applied after ``top_k``."""
    top_k: int = 0
    """Keep this many of the most likely tokens; 0 keeps all. At most LARGEST_TOP_K."""
    max_new_tokens: int = 256
    n: int = 1
    """Samples of the prompt. Each draws its own numbers; the prompt's keys and values are shared."""
    seed: int | None = None
    """Token i of sample j depends on (seed, j, i) and its distribution alone. None: the engine chooses one."""
    stop_token_ids: tuple[int, ...] = ()
    """End after one of these; the token stays in ``token_ids``. The model's own end tokens are added to them."""
    stop: tuple[str, ...] = ()
    """End as soon as the text contains one of these. Needs an engine with a tokenizer."""
    ignore_eos: bool = False
    """Do not end at the model's own end tokens."""
    raw_logprobs: bool = False
    """Also return the log-probability of every token at temperature 1 over the whole vocabulary."""
    top_logprobs: int = 0
    """Name so many of the most likely tokens in every ``TokenEvent``, at temperature 1 over the whole vocabulary."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""

    def __post_init__(self) -> None:
        for name, low, high in (("temperature", 0.0, 1e6), ("top_p", 0.0, 1.0)):
            value = getattr(self, name)
            if not math.isfinite(value) or not low <= value <= high:
                raise RequestError(f"{name}: {value} is not between {low:g} and {high:g}")
        if self.temperature < LEAST_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)
        if self.top_p == 0:
            raise RequestError("top_p: 0 keeps no token; use temperature 0 for greedy decoding")
        for name, least in (("top_k", 0), ("max_new_tokens", 1), ("n", 1), ("top_logprobs", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise RequestError(f"{name}: {value!r} is not a whole number of at least {least}")
        if self.top_k > LARGEST_TOP_K:
            raise RequestError(f"top_k: {self.top_k} is above {LARGEST_TOP_K}")
        if self.seed is not None and type(self.seed) is not int:
            raise RequestError(f"seed: {self.seed!r} is not a whole number")
        if "" in self.stop:
            raise RequestError("stop: an empty string would end every text at once")


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True)
class Completion:
    """One sample, finished or aborted. The per-token fields are aligned with ``token_ids``."""

    request_id: str
    index: int
    """Which of the request's n samples."""
    token_ids: tuple[int, ...]
    """What was sampled, a stop token included."""
    logprobs: tuple[float, ...]
    """Log-probability of each token in the distribution it was drawn from: after temperature, top-k and top-p. For
    greedy tokens, which are not drawn, the log-softmax of the logits."""
    versions: tuple[int, ...]
    """Version of the weights that made each token."""
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens whose keys and values were already in the cache when the sample was first admitted."""
    raw_logprobs: tuple[float, ...] | None = None
    """Log-softmax of the logits at temperature 1, where asked for."""
    text: str | None = None
    """Decoded tokens, without a final stop token and cut before a stop string; None for an engine without tokenizer."""


@dataclass(frozen=True)
class TokenEvent:
    """One token that a step made, for those who stream."""

    request_id: str
    index: int
    token_id: int
    logprob: float
    """In the distribution it was drawn from."""
    raw_logprob: float
    """At temperature 1 over the whole vocabulary."""
    top: tuple[tuple[int, float], ...]
    """Token ids and raw log-probabilities of the most likely tokens, best first, where asked for."""
    completion: Completion | None
    """The whole sample where this was its last token."""
