"""From a checked request to what the engine is asked: prompts as token ids, sampling parameters, limits kept."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from infir2.data.chat import ChatTokenizer, choose_template
from infir2.data.documents import BadRow
from infir2.errors import DataError
from infir2.rollout.engine import Engine
from infir2.rollout.records import Request, RequestError, SamplingParams
from infir2.serve.errors import ApiError
from infir2.serve.limits import ServerLimits
from infir2.serve.protocol import ChatRequest, CompletionRequest, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMPLETION_TOKENS = 16
"""max_tokens of a plain completion that names none, as in OpenAI's API; a chat then may use all there is."""

_OPTION = "--chat-template"


@dataclass(frozen=True)
class ServedModel:
    """What requests are made for."""

    name: str
    tokenizer: "PreTrainedTokenizerBase"
    chat: ChatTokenizer | None
    """None where the tokenizer has no chat template and no tokens for ChatML."""
    chat_problem: str
    longest: int
    """Tokens of prompt and completion together."""
    end_ids: frozenset[int]
    """Tokens that end a text of this model."""
    chat_end_ids: frozenset[int]
    """These, and the one that ends a turn."""

    @staticmethod
    def of(
        engine: Engine,
        name: str,
        tokenizer: "PreTrainedTokenizerBase",
        end_ids: Iterable[int] = (),
        template: str = "auto",
    ) -> "ServedModel":
        """``end_ids``: more than the model's config and the tokenizer name.

        Raises DataError for a ``template`` (see ``data.chat.choose_template``) that cannot be read.
        """
        chat, problem = None, ""
        try:
            chat = ChatTokenizer(tokenizer, choose_template(tokenizer, template, _OPTION), _OPTION)
        except DataError as error:
            if template != "auto":
                raise
            problem = str(error)
        cache = engine.options.cache_tokens // engine.options.block_size * engine.options.block_size
        ends = {*engine.model.config.eos_token_ids, *end_ids}
        if tokenizer.eos_token_id is not None:
            ends.add(tokenizer.eos_token_id)
        turn = chat.end_of_turn() if chat else None
        turns = ends if turn is None else {*ends, turn}
        longest = int(min(engine.max_length, cache))
        return ServedModel(name, tokenizer, chat, problem, longest, frozenset(ends), frozenset(turns))


def engine_requests(request: Sampling, served: ServedModel, limits: ServerLimits) -> list[Request]:
    """One for each prompt. Raises ApiError 400 or 404."""
    if request.model != served.name:
        message = f"model: {request.model!r} is not served here, {served.name!r} is"
        raise ApiError(404, message, "model", "model_not_found")
    return [_engine_request(request, ids, served, limits) for ids in _prompts(request, served, limits)]


def stop_ids(request: Sampling, served: ServedModel) -> frozenset[int]:
    """Tokens that end a sample and are not part of its text."""
    ends = served.chat_end_ids if isinstance(request, ChatRequest) else served.end_ids
    return frozenset(request.stop_token_ids) | (frozenset() if request.ignore_eos else ends)


def _prompts(request: Sampling, served: ServedModel, limits: ServerLimits) -> list[list[int]]:
    if isinstance(request, ChatRequest):
        _check_samples(1, request.n, limits)
        if served.chat is None:
            raise ApiError(400, f"messages: {served.chat_problem}", "messages")
        try:
            return [served.chat.prompt([message.plain() for message in request.messages])]
        except BadRow as error:
            raise ApiError(400, f"messages: the chat template refuses them: {error.detail}", "messages") from None
        except DataError as error:
            raise ApiError(400, f"messages: {error}", "messages") from None
    assert isinstance(request, CompletionRequest)
    prompt: Any = request.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    _check_samples(len(prompt), request.n, limits)  # before the work of tokenising them
    ids = [served.tokenizer(one)["input_ids"] if isinstance(one, str) else one for one in prompt]
    if not ids or not all(ids):
        raise ApiError(400, "prompt: has no tokens", "prompt")
    return ids


def _check_samples(prompts: int, n: int, limits: ServerLimits) -> None:
    if prompts * n > limits.samples:
        raise ApiError(400, f"n: {prompts} prompts x {n} samples exceed the limit of {limits.samples}", "n")


def _engine_request(request: Sampling, ids: list[int], served: ServedModel, limits: ServerLimits) -> Request:
    room = served.longest - len(ids)
    if room < 1:
        raise ApiError(
            400, f"the prompt has {len(ids)} tokens, and prompt and completion together may have {served.longest}",
            "messages" if isinstance(request, ChatRequest) else "prompt", "context_length_exceeded",
        )  # fmt: skip
    most = min(room, limits.max_tokens or room)
    wanted, name = request.max_tokens, "max_tokens"
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        wanted, name = request.max_completion_tokens, "max_completion_tokens"
    if wanted is not None and wanted > most:
        raise ApiError(
            400, f"{name}: {wanted} is above {most}, the limit for this prompt of {len(ids)} tokens", name,
            "context_length_exceeded",
        )  # fmt: skip
    if wanted is None:
        wanted = most if isinstance(request, ChatRequest) else min(most, COMPLETION_TOKENS)
    try:
        params = SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=max(request.top_k, 0),
            max_new_tokens=wanted,
            n=request.n,
            seed=request.seed,
            stop_token_ids=tuple(stop_ids(request, served)),
            stop=request.stops,
            ignore_eos=request.ignore_eos,
            top_logprobs=request.top_logprobs_wanted or 0,
            skip_special_tokens=request.skip_special_tokens,
        )
    except RequestError as error:
        raise ApiError(400, str(error), str(error).partition(":")[0]) from None
    return Request(tuple(ids), params)
