"""Who answers: a model in this process, or any OpenAI-compatible server. Both are asked the same way.

Every sample has a seed of its own, a function of (seed, problem, number of the sample): so two models that are
compared draw with the same random numbers, and the engine and our server give the same samples.
"""

import hashlib
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Protocol

from infir2.data.chat import ChatTokenizer
from infir2.data.conversations import Message
from infir2.data.documents import BadRow
from infir2.errors import DataError, UserError
from infir2.evaluate.tasks import Sampling
from infir2.rollout.interface import RolloutEngine
from infir2.rollout.records import Request, RequestError, SamplingParams

Progress = Callable[[int, int], None]
"""Called with the samples that are finished, and all."""


@dataclass(frozen=True)
class Asked:
    """One sample that is wanted."""

    messages: Sequence[Message]
    seed: int


@dataclass(frozen=True)
class Response:
    """One sample. ``tokens`` counts what was generated, a final stop token included."""

    text: str
    tokens: int
    truncated: bool


class Responder(Protocol):
    """Answers questions."""

    def respond(self, asked: Sequence[Asked], sampling: Sampling, progress: Progress) -> list[Response]:
        """One response for each, in order. Raises UserError where a question cannot be answered."""
        ...


def seed_of(seed: int, problem: str, messages: Sequence[Message], index: int) -> int:
    """Below 2^63: servers read seeds as signed 64-bit numbers. Where the question lies does not count: the same file in
    another folder gives the same samples."""
    asked = json.dumps([seed, problem, list(messages), index], sort_keys=True)
    digest = hashlib.blake2b(asked.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class EngineResponder:
    """An engine of this process. ``stop_ids`` end a turn; ``longest`` is the room for prompt and response together.

    A response ends where the model has no more positions, even before ``max_tokens``; it then counts as truncated.
    """

    def __init__(self, engine: RolloutEngine, chat: ChatTokenizer, stop_ids: Sequence[int], longest: int) -> None:
        self.engine, self.chat, self.stop_ids, self.longest = engine, chat, tuple(stop_ids), longest

    def respond(self, asked: Sequence[Asked], sampling: Sampling, progress: Progress) -> list[Response]:
        try:
            completions = self.engine.generate([self._request(one, sampling) for one in asked], progress)
        except RequestError as error:
            raise UserError(f"a problem cannot be asked: {error}") from None
        found = [group[0] for group in completions]
        return [Response(one.text or "", len(one.token_ids), one.finish_reason == "length") for one in found]

    def _request(self, asked: Asked, sampling: Sampling) -> Request:
        try:
            ids = self.chat.prompt(asked.messages)
        except BadRow as error:
            raise DataError(f"the chat template refuses a problem: {error.detail}") from None
        room = self.longest - len(ids)
        if room < 1:
            raise UserError(f"a problem has {len(ids)} tokens, but the model has room for {self.longest} only")
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_new_tokens=min(sampling.max_tokens, room),
            seed=asked.seed,
            stop_token_ids=self.stop_ids,
        )
        return Request(tuple(ids), params)


class ApiResponder:
    """A server's /chat/completions, asked ``concurrency`` samples at a time."""

    def __init__(self, url: str, api_key: str, model: str, concurrency: int, timeout_s: float = 3600.0) -> None:
        self.url, self.api_key, self.model = url.rstrip("/"), api_key, model
        self.concurrency, self.timeout_s = concurrency, timeout_s

    def respond(self, asked: Sequence[Asked], sampling: Sampling, progress: Progress) -> list[Response]:
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="ask") as pool:
            futures = [pool.submit(self._ask, one, sampling) for one in asked]
            try:
                for finished, future in enumerate(as_completed(futures), 1):
                    future.result()
                    progress(finished, len(futures))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            return [future.result() for future in futures]

    def _ask(self, asked: Asked, sampling: Sampling) -> Response:
        body = {
            "model": self.model,
            "messages": list(asked.messages),
            "seed": asked.seed,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        headers = {"Authorization": f"Bearer {self.api_key}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as reply:
                answer = json.load(reply)
            choice = answer["choices"][0]
            text = (choice["message"].get("reasoning_content") or "") + (choice["message"]["content"] or "")
            return Response(text, int(answer["usage"]["completion_tokens"]), choice["finish_reason"] == "length")
        except urllib.error.HTTPError as error:
            raise UserError(f"{self.url}: {error.code}: {_told(error)}") from None
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{self.url}: {getattr(error, 'reason', None) or error}") from None
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{self.url}: not the answer of an OpenAI-compatible server: {error!r}") from None


def _told(error: urllib.error.HTTPError) -> str:
    """The message of an error's body."""
    raw = error.read(10_000)
    try:
        told: Any = json.loads(raw)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        told = raw.decode(errors="replace")
    return str(told)
