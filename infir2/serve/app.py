"""The routes. A request becomes engine requests, and their tokens an answer; whoever goes away early frees what is
unfinished of theirs."""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from infir2.rollout.records import Completion, RequestError, TokenEvent
from infir2.rollout.records import Request as EngineRequest
from infir2.serve.engine_thread import EngineFault, EngineThread, Overloaded, Stream
from infir2.serve.errors import ApiError
from infir2.serve.guard import KeyGuard
from infir2.serve.limits import ServerLimits
from infir2.serve.metrics import CONTENT_TYPE, Metrics
from infir2.serve.prompts import ServedModel, engine_requests, stop_ids
from infir2.serve.protocol import ChatRequest, CompletionRequest, Sampling, parse
from infir2.serve.responses import Answer, usage
from infir2.serve.text import PieceStream

_log = logging.getLogger(__name__)
CLIENT_GONE = 499
"""The status under which requests without a reader are counted (nginx's)."""


@dataclass
class Server:
    """What the routes share."""

    engine: EngineThread
    served: ServedModel
    limits: ServerLimits
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))

    def model_card(self) -> dict[str, Any]:
        card = {"id": self.served.name, "object": "model", "created": self.created, "owned_by": "infir2"}
        return {**card, "max_model_len": self.served.longest}


def make_app(server: Server, api_key: str) -> FastAPI:
    """The application; it starts and stops the engine's thread."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.engine.start()
        yield
        await server.engine.stop()

    app = FastAPI(title="infir2 serve", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(KeyGuard, api_key=api_key)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(Exception, _fault)

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"}) if server.engine.alive else _dead().response()

    @app.get("/metrics")
    async def metrics() -> Response:
        server.metrics.faults = server.engine.faults
        text = server.metrics.render(server.engine.stats, server.engine.open_streams)
        return Response(text, media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [server.model_card()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != server.served.name:
            raise ApiError(404, f"the model {name!r} is not served here", "model", "model_not_found")
        return JSONResponse(server.model_card())

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _counted(server, "chat", lambda: _generate(server, request, ChatRequest))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _counted(server, "completions", lambda: _generate(server, request, CompletionRequest))

    return app


# ---- one request


async def _counted(server: Server, route: str, answer: Callable[[], Awaitable[Response]]) -> Response:
    """Count a request from here to the end of its answer, however that comes."""
    metrics, began = server.metrics, time.perf_counter()
    metrics.in_flight += 1

    def done(status: int) -> None:
        metrics.in_flight -= 1
        metrics.requests[route, status] += 1
        metrics.seconds[route] += time.perf_counter() - began
        metrics.disconnects += status == CLIENT_GONE

    status = 500
    try:
        response = await answer()
        status = response.status_code
        if isinstance(response, _EventStream):
            response.when_done = done
        return response
    except ApiError as error:
        status = error.status
        raise
    except asyncio.CancelledError:
        status = CLIENT_GONE
        raise
    finally:
        if not (status == 200 and isinstance(response, _EventStream)):
            done(status)


async def _generate(server: Server, request: Request, kind: type[Sampling]) -> Response:
    body = await _body(request, server.limits)
    # Tokenising a long prompt takes a while; the event loop goes on meanwhile.
    asked, todo = await asyncio.to_thread(_prepare, kind, body, server)
    answer = Answer(
        "chat" if kind is ChatRequest else "text", server.served.name, server.served.tokenizer,
        asked.top_logprobs_wanted, asked.return_token_ids,
    )  # fmt: skip
    job = _Job(server, asked, todo, answer)
    with contextlib.ExitStack() as held:
        try:
            streams = [held.enter_context(server.engine.submit(one)) for one in todo]
        except Overloaded as error:
            raise ApiError(429, str(error), code="overloaded") from None
        except EngineFault as error:
            raise ApiError(503, str(error)) from None
        if asked.stream:
            await _accepted(streams)
            return _EventStream(job.events(streams), held.pop_all())
        whole = asyncio.ensure_future(job.whole(streams))
        gone = asyncio.ensure_future(_until_gone(request))
        try:
            await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not whole.done():
                return Response(status_code=CLIENT_GONE)
            return JSONResponse(whole.result())
        finally:
            whole.cancel()
            gone.cancel()


def _prepare(kind: type[Sampling], body: bytes, server: Server) -> tuple[Sampling, list[EngineRequest]]:
    asked = parse(kind, body)
    return asked, engine_requests(asked, server.served, server.limits)


async def _body(request: Request, limits: ServerLimits) -> bytes:
    """The body. Raises ApiError 413 for one that is too long, without reading all of it, and 408 for a slow one."""
    chunks, size = [], 0
    too_long = ApiError(413, f"the body is above the limit of {limits.body_bytes} bytes")
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > limits.body_bytes:
        raise too_long
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limits.body_bytes:
                    raise too_long
                chunks.append(chunk)
    except ClientDisconnect:
        raise ApiError(CLIENT_GONE, "the client has gone") from None
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {limits.body_seconds:g} seconds") from None
    return b"".join(chunks)


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _accepted(streams: list[Stream]) -> None:
    """Wait until the engine has taken the requests, so that a refusal is still a status and not half an answer."""
    try:
        for stream in streams:
            await stream.accepted
    except RequestError as error:
        raise ApiError(400, str(error)) from None
    except EngineFault as error:
        raise ApiError(500, str(error)) from None


class _Job:
    """One HTTP request's samples, from tokens to its answer. Choice i is sample i % n of prompt i // n."""

    def __init__(self, server: Server, asked: Sampling, todo: list[EngineRequest], answer: Answer) -> None:
        self.asked, self.answer = asked, answer
        self.tokenizer = server.served.tokenizer
        self.ends = stop_ids(asked, server.served)
        self.prompt_tokens = sum(len(one.prompt_ids) for one in todo)

    async def whole(self, streams: list[Stream]) -> dict[str, Any]:
        await _accepted(streams)
        tokens: dict[int, list[TokenEvent]] = {}
        finished: dict[int, Completion] = {}
        try:
            for number, stream in enumerate(streams):
                async for step in stream:
                    for event in step:
                        index = number * self.asked.n + event.index
                        shown = tokens.setdefault(index, [])
                        if event.token_id not in self.ends:
                            shown.append(event)
                        if event.completion:
                            finished[index] = event.completion
        except EngineFault as error:
            raise ApiError(500, str(error)) from None
        choices = [self.answer.choice(index, finished[index], tokens[index]) for index in sorted(finished)]
        return self.answer.whole(choices, usage(self.prompt_tokens, list(finished.values())))

    async def events(self, streams: list[Stream]) -> AsyncIterator[dict[str, Any]]:
        """The chunks. The answers to several prompts come one after another."""
        wants_usage = bool(self.asked.stream_options and self.asked.stream_options.include_usage)
        finished: list[Completion] = []
        if self.answer.kind == "chat":
            for index in range(self.asked.n):
                yield self.answer.chunk([self.answer.opening(index)], None, wants_usage)
        for number, stream in enumerate(streams):
            writers = {
                i: _Writer(self.answer, number * self.asked.n + i, self._pieces(), self.ends)
                for i in range(self.asked.n)
            }
            async for step in stream:
                finished += [event.completion for event in step if event.completion]
                for index, writer in writers.items():
                    if choice := writer.push([event for event in step if event.index == index]):
                        yield self.answer.chunk([choice], None, wants_usage)
        if wants_usage:
            yield self.answer.chunk([], usage(self.prompt_tokens, finished), True)

    def _pieces(self) -> PieceStream:
        return PieceStream(self.tokenizer, self.asked.stops, self.asked.skip_special_tokens)


class _Writer:
    """One choice of a streamed answer."""

    def __init__(self, answer: Answer, index: int, pieces: PieceStream, ends: frozenset[int]) -> None:
        self.answer, self.index, self.pieces, self.ends = answer, index, pieces, ends
        self.offset = 0

    def push(self, events: list[TokenEvent]) -> dict[str, Any] | None:
        """The chunk that new tokens make; None where there is nothing to tell yet."""
        text = "".join(map(self.pieces.push, events))
        shown = [event for event in events if event.token_id not in self.ends]
        completion = events[-1].completion if events else None
        tells = self.answer.top is not None or self.answer.return_token_ids
        if not (text or completion or (shown and tells)):
            return None
        choice = self.answer.piece(self.index, text, shown, self.offset, completion)
        if self.answer.top is not None:
            self.offset += self.answer.length(shown)
        return choice


class _EventStream(StreamingResponse):
    """Server-sent events. Whatever ends them, the engine's streams are closed and the request is counted."""

    def __init__(self, chunks: AsyncIterator[dict[str, Any]], held: contextlib.ExitStack) -> None:
        super().__init__(self._lines(chunks), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._held = held
        self._whole = False
        self.when_done: Callable[[int], None] = lambda status: None

    async def _lines(self, chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
        status = "[DONE]"
        try:
            async for chunk in chunks:
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
        except EngineFault as error:
            status = json.dumps(ApiError(500, str(error)).body())
        except Exception as error:  # the status has been sent: the stream is where it can still be told
            status = json.dumps(_failed(error).body())
        yield f"data: {status}\n\n"
        self._whole = True

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._held.close()
            self.when_done(200 if self._whole else CLIENT_GONE)


# ---- errors


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_exception(request: Request, error: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()


async def _fault(request: Request, error: Exception) -> Response:
    return _failed(error).response()


def _failed(error: Exception) -> ApiError:
    _log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed; see its log")


def _dead() -> ApiError:
    return ApiError(503, "the engine has died; see the server's log")
