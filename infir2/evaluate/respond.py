"""Who answers: a model in this process, or any OpenAI-compatible server. Both are asked the same way.

Every sample has a seed of its own, a function of (seed, problem, number of the sample): so two models that are
compared draw with the same random numbers, and the engine and our server give the same samples.
"""

import contextlib
import hashlib
import http.client
import json
import queue
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
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
MAX_ASKED = 6
"""How often a server is asked for one sample."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""Before it is asked again: at first (twice as long each time), and at most, if the server itself wants a pause."""
_BUSY = (429, 502, 503)


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
    """A server's /chat/completions, asked ``concurrency`` samples at a time.

    A server that is busy (429, 502, 503), or cannot be reached after it has answered before, is asked again some times.
    """

    def __init__(self, url: str, api_key: str, model: str, concurrency: int, timeout_s: float = 3600.0) -> None:
        self.url, self.api_key, self.model = url.rstrip("/"), api_key, model
        self.concurrency, self.timeout_s = concurrency, timeout_s
        self.pause_s = FIRST_PAUSE_S
        self._has_answered = False

    def respond(self, asked: Sequence[Asked], sampling: Sampling, progress: Progress) -> list[Response]:
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        answered: queue.SimpleQueue[tuple[int, Response | BaseException]] = queue.SimpleQueue()
        given_up = threading.Event()

        def work() -> None:
            with contextlib.suppress(queue.Empty):
                while not given_up.is_set():
                    number = waiting.get_nowait()
                    try:
                        answered.put((number, self._ask(asked[number], sampling, given_up)))
                    except BaseException as error:
                        answered.put((number, error))

        for number in range(len(asked)):
            waiting.put(number)
        # Daemons, and no pool, which would wait: after a failure or Ctrl-C nobody wants the answers that are under way,
        # and one of 30,000 tokens takes minutes.
        for _ in range(min(self.concurrency, len(asked))):
            threading.Thread(target=work, name="ask", daemon=True).start()
        found: dict[int, Response] = {}
        try:
            while len(found) < len(asked):
                number, answer = answered.get()
                if isinstance(answer, BaseException):
                    raise answer
                found[number] = answer
                progress(len(found), len(asked))
        finally:
            given_up.set()
        return [found[number] for number in range(len(asked))]

    def _ask(self, asked: Asked, sampling: Sampling, given_up: threading.Event) -> Response:
        """Ask, and again where that may help, until ``given_up``. Raises UserError."""
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
        for asked_before in range(MAX_ASKED):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as reply:
                    response = _response(json.load(reply))
                self._has_answered = True
                return response
            except urllib.error.HTTPError as error:
                trouble, again = f"{error.code}: {_told(error)}", error.code in _BUSY
                wanted = _retry_after(error)
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None) or error
                trouble, wanted = str(reason) or type(reason).__name__, 0.0
                again = self._has_answered and not isinstance(reason, TimeoutError)
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise UserError(f"{self.url}: not the answer of an OpenAI-compatible server: {error!r}") from None
            jitter = random.uniform(0.75, 1.25)  # not all at the same moment
            pause = max(wanted, self.pause_s * 2**asked_before * jitter)
            if not again or asked_before + 1 == MAX_ASKED or given_up.wait(pause):
                break
        raise UserError(f"{self.url}: {trouble}")


def _response(answer: Any) -> Response:
    """Of the body of an answer. Servers with a reasoning parser take the thought out of the text, and its tags away; as
    the model wrote it, a thought that was cut off is none that was closed."""
    choice = answer["choices"][0]
    message = choice["message"]
    text = message.get("content") or ""
    if thought := message.get("reasoning_content") or message.get("reasoning"):
        text = f"<think>{thought}" + (f"</think>{text}" if text else "")
    return Response(text, int(answer["usage"]["completion_tokens"]), choice["finish_reason"] == "length")


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Seconds that the server asks to wait, within bounds; 0 where it does not."""
    text = error.headers.get("Retry-After") or ""
    try:
        seconds = float(text) if text.isdigit() else parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError):
        return 0.0
    return min(max(seconds, 0.0), LONGEST_PAUSE_S)


def _told(error: urllib.error.HTTPError) -> str:
    """The message of an error's body."""
    raw = error.read(10_000)
    try:
        told: Any = json.loads(raw)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        told = raw.decode(errors="replace")
    return str(told)
