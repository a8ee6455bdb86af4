"""The server inside this process: who may pass, what is too much, and what a fault of the engine leaves behind."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_chat
import torch
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from pydantic import ValidationError
from rich.console import Console
from starlette.websockets import WebSocketDisconnect

from infir2 import cli
from infir2.data import time_limit
from infir2.errors import ConfigError
from infir2.launch.inference import InferenceOptions, load_engine
from infir2.rollout.engine import Engine
from infir2.rollout.options import EngineOptions
from infir2.rollout.records import Completion, Request, SamplingParams, TokenEvent
from infir2.serve.app import Server, make_app
from infir2.serve.engine_thread import EngineFault, EngineThread, Stream
from infir2.serve.errors import ApiError
from infir2.serve.http import listen
from infir2.serve.limits import ServerLimits
from infir2.serve.prompts import ServedModel
from infir2.serve.protocol import ChatRequest, CompletionRequest, parse
from infir2.serve.responses import Answer
from infir2.serve.text import PieceStream
from infir2.stages.serve import api_key

KEY = {"Authorization": "Bearer secret"}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    model = small_chat.write_chat_model(tmp_path_factory.mktemp("chat"))
    options = InferenceOptions(dtype="float32", cache_tokens=2048, max_sequences=16)
    made, _, _ = load_engine(str(model), options, Console(quiet=True))
    return made


def make_server(engine: Engine, limits: ServerLimits) -> Server:
    served = ServedModel.of(engine, "small", engine.tokenizer)
    return Server(EngineThread(engine, limits.pending), served, limits)


@pytest.fixture
def client(engine: Engine) -> Iterator[TestClient]:
    limits = ServerLimits(pending=8, max_tokens=64, body_seconds=0.2)
    with TestClient(make_app(make_server(engine, limits), "secret"), raise_server_exceptions=False) as made:
        yield made


def ask(client: TestClient, **changes: Any) -> Any:
    asked = {"model": "small", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, **changes}
    return client.post(CHAT, json=asked, headers=KEY)


def held(client: TestClient) -> dict[str, float]:
    lines = client.get("/metrics", headers=KEY).text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    names = ("sequences_running", "sequences_waiting", "cache_blocks_held", "open_streams")
    return {name: float(values[f"infir2_{name}"]) for name in names}


def test_no_route_but_health_opens_without_the_key(client: TestClient) -> None:
    routes = [route for route in client.app.routes if isinstance(route, APIRoute)]
    assert {route.path for route in routes} == {
        "/health", "/metrics", "/v1/models", "/v1/models/{name:path}", "/v1/chat/completions", "/v1/completions",
    }  # fmt: skip
    assert len(routes) == len(client.app.routes), "a route of another kind: add it here"
    calls = [(method, route.path.replace("{name:path}", "small")) for route in routes for method in route.methods]
    calls += [("GET", path) for path in ("/", "/nothing", "/docs", "/openapi.json", "/health/", "//health", "/v1")]
    calls += [("OPTIONS", "/v1/models"), ("HEAD", "/v1/models"), ("DELETE", CHAT)]
    for method, path in calls:
        expected = 200 if path == "/health" else 401
        assert client.request(method, path).status_code == expected, (method, path)
        for wrong in ("secret", "Basic secret", "bearer secret", "Bearer ", "Bearer Secret", "Bearer secrets"):
            assert client.request(method, path, headers={"Authorization": wrong}).status_code == expected, wrong
    twice = [("Authorization", "Bearer x"), ("Authorization", "Bearer secret")]
    assert client.get("/v1/models", headers=twice).status_code == 401
    refused = client.get("/v1/models")
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(WebSocketDisconnect), client.websocket_connect(CHAT, headers=KEY):
        pass
    assert client.get("/v1/models", headers=KEY).status_code == 200


def test_a_fault_of_the_engine_is_told_and_leaves_nothing(client: TestClient, engine: Engine) -> None:
    before = ask(client, seed=1).json()["choices"]
    weight = engine.model.model.norm.weight
    good = weight.clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    failed = ask(client)
    assert failed.status_code == 500
    assert "not finite" in failed.json()["error"]["message"]
    streamed = ask(client, stream=True)
    assert streamed.status_code == 200
    last = streamed.text.strip().split("\n\n")[-1]
    assert "not finite" in json.loads(last.removeprefix("data: "))["error"]["message"]
    with torch.no_grad():
        weight.copy_(good)
    assert set(held(client).values()) == {0}
    assert "infir2_engine_faults_total 2" in client.get("/metrics", headers=KEY).text
    engine.flush_cache()  # the broken weights' keys and values
    assert client.get("/health").json() == {"status": "ok"}
    assert ask(client, seed=1).json()["choices"] == before


def test_too_little_memory_is_told_without_torch_s_words(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def step() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has. Including non-PyTorch")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", step)
        failed = ask(client)
    assert failed.status_code == 500
    assert failed.json()["error"]["message"] == "the engine failed: it needs more memory than its device has"
    (record,) = caplog.records
    assert record.exc_info is None
    assert "lower --cache-tokens (2048), --max-batch-tokens (4096) or --max-sequences (16) (CUDA out of" in caplog.text
    assert ask(client).status_code == 200


def test_a_fault_while_a_stream_is_written_is_told_in_it(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no such token")

    monkeypatch.setattr(PieceStream, "push", fail)
    last = ask(client, stream=True).text.strip().split("\n\n")[-1]
    assert "see its log" in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert "infir2_client_disconnects_total 0" in client.get("/metrics", headers=KEY).text, "the client was there"
    deadline = time.monotonic() + 10
    while set(held(client).values()) != {0}:  # the engine hears of it between two steps
        assert time.monotonic() < deadline


def test_a_fault_ends_only_what_the_failed_step_computed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request runs, one waits for its place in the engine, one has not reached the engine yet."""
    one_place = Engine(engine.model, engine.tokenizer, EngineOptions(cache_tokens=2048, max_sequences=1))
    one_place.wake()
    asked = Request((1, 2, 3), SamplingParams(max_new_tokens=4, seed=1, ignore_eos=True))
    step, state = one_place.step, {"steps": 0}

    async def read(stream: Stream) -> Any:
        with stream:
            try:
                return [event.token_id async for events in stream for event in events]
            except EngineFault as error:
                return str(error)

    async def serve() -> list[Any]:
        thread, loop = EngineThread(one_place, 8), asyncio.get_running_loop()
        submitted = threading.Event()
        late: list[Stream] = []

        def submit_late() -> None:
            late.append(thread.submit(asked))
            submitted.set()

        def failing() -> Any:
            state["steps"] += 1
            if state["steps"] != 2:
                return step()
            step()  # computed, and then lost
            loop.call_soon_threadsafe(submit_late)
            submitted.wait(30)
            raise RuntimeError("broken")

        monkeypatch.setattr(one_place, "step", failing)
        thread.start()
        streams = [thread.submit(asked), thread.submit(asked)]
        first, second = await asyncio.gather(*map(read, streams))
        answers = [first, second, await read(late[0])]
        await thread.stop()
        assert (thread.open_streams, thread.faults) == (0, 1)
        return answers

    first, second, third = asyncio.run(serve())
    assert first == "the engine failed: RuntimeError: broken"
    assert second == third == list(one_place.generate([asked])[0][0].token_ids)
    assert one_place.stats().blocks_held == 0


def test_a_fault_with_nothing_running_ends_all(engine: Engine) -> None:
    waiting = Engine(engine.model, engine.tokenizer, EngineOptions(cache_tokens=2048))
    for _ in range(2):
        waiting.add_request(Request((1, 2), SamplingParams(n=2)))
    assert waiting.abort_running() == frozenset()
    assert not waiting.has_unfinished


def test_who_has_everything_hears_of_no_fault(engine: Engine) -> None:
    """The last tokens are delivered but not read when another request's step fails."""

    async def serve() -> list[list[int]]:
        thread = EngineThread(engine, 8)
        thread.start()
        with thread.submit(Request((1, 2, 3), SamplingParams(max_new_tokens=4, ignore_eos=True))) as stream:
            while stream._to_come:
                await asyncio.sleep(0.01)
            thread._fault("broken", frozenset(), engine.stats())
            tokens = [[event.token_id for event in events] async for events in stream]
        await thread.stop()
        return tokens

    assert len(asyncio.run(serve())[0]) == 4


def test_limits(client: TestClient) -> None:
    busy = ask(client, n=9)
    assert (busy.status_code, busy.headers["retry-after"]) == (429, "1")
    assert busy.json()["error"]["type"] == "rate_limit_error"
    assert ask(client, n=8).status_code == 200
    long = ask(client, max_tokens=65)
    assert (long.status_code, long.json()["error"]["param"]) == (400, "max_tokens")
    huge = ask(client, top_k=2**63)  # as a number of the batch it would fail the step, and everybody's requests
    assert (huge.status_code, huge.json()["error"]["param"]) == (400, "top_k")
    assert ask(client, max_completion_tokens=9, max_tokens=None).json()["usage"]["completion_tokens"] <= 9
    with pytest.raises(ConfigError, match="pending: 0"):
        ServerLimits(pending=0)


def test_a_body_that_never_ends_is_given_up(client: TestClient) -> None:
    async def slow() -> list[dict[str, Any]]:
        parts = iter([{"type": "http.request", "body": b'{"model"', "more_body": True}])

        async def receive() -> Any:
            for part in parts:
                return part
            await asyncio.sleep(60)

        sent: list[dict[str, Any]] = []

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"authorization", b"Bearer secret")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers, "query_string": b""}
        await client.app({**scope, "raw_path": CHAT.encode(), "http_version": "1.1"}, receive, send)
        return sent

    assert asyncio.run(slow())[0]["status"] == 408


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body is not JSON: EOF"),
        (b"[" * 100_000, "the body is not JSON: recursion limit"),
        (b"[]", "the body is not a JSON object"),
        (b"{}", "model: this field is required"),
        (b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}', "the body is not JSON"),
        (b'{"model": "m", "messages": [{"role": "robot", "content": "a"}]}', "messages.0.role: input should be"),
        (
            b'{"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            "messages.0.content.0.type: input should be 'text'",
        ),
        (b'{"model": "m", "messages": [], "temperature": NaN}', "temperature: input should be a finite number"),
        (
            b'{"model": "m", "messages": [{"role": "user", "content": "a", "reasoning_content": "b"}]}',
            "messages.0.reasoning_content: unknown parameter",
        ),
        (
            b'{"model": "m", "messages": [{"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}]}',
            "messages.0.tool_calls: unknown parameter",
        ),
        (
            b'{"model": "m", "messages": [{"role": "user", "content": "a", "name": 1}]}',
            "messages.0.name: unknown parameter",
        ),
        (b'{"model": "m", "messages": [], "min_tokens": 2}', "min_tokens: this server does not support it beyond 0"),
        (
            b'{"model": "m", "messages": [], "stream": true, "stream_options": {"continuous_usage_stats": true}}',
            "stream_options.continuous_usage_stats: input should be False",
        ),
        (b'{"model": "m", "messages": [], "stream": 1}', "stream: input should be a valid boolean"),
        (b'{"model": "m", "messages": [], "stop": [1]}', "stop.0: input should be a valid string"),
        (b'{"model": "m", "messages": [], "n": true}', "n: input should be a valid integer"),
        (b'{"model": "m", "messages": [], "temperature": "1"}', "temperature: input should be a valid number"),
        (b'{"model": "m", "messages": [], "seed": 9223372036854775808}', "seed: input should be less than"),
    ],
)
def test_requests_that_cannot_be_read(body: bytes, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse(ChatRequest, body)
    assert caught.value.status == 400
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize("field", [b'"prompt": [%s1]', b'"messages": [%s1]', b'"messages": [{"content": [%s1]}]'])
def test_of_many_mistakes_only_the_first_is_collected(field: bytes) -> None:
    """A million mistakes in a body of 4 MB would hold the interpreter for half a minute and take gigabytes."""
    kind = CompletionRequest if b"prompt" in field else ChatRequest
    with pytest.raises(ValidationError) as caught:
        kind.model_validate_json(b'{"model": "m", ' + field % (b"{}," * 1000) + b"}")
    assert caught.value.error_count() < 10


def test_too_many_prompts_are_refused_before_they_are_tokenised(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenised: list[str] = []
    monkeypatch.setattr(type(engine.tokenizer), "__call__", lambda self, text, **_: tokenised.append(text))
    body = {"model": "small", "prompt": ["a"] * 1000, "max_tokens": 1}
    answer = client.post("/v1/completions", json=body, headers=KEY)
    assert (answer.status_code, answer.json()["error"]["param"], tokenised) == (400, "n", [])


def test_a_chat_template_that_does_not_end_is_the_request_s_error(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time_limit, "LIMIT_S", 1)
    template = tmp_path / "chat.jinja"
    loops = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
    template.write_text("{% if messages[0].content == 'loop' %}" + loops + "{% endif %}{{ messages[0].content }}")
    served = ServedModel.of(engine, "small", engine.tokenizer, template=str(template))
    server = Server(EngineThread(engine, 8), served, ServerLimits())
    with TestClient(make_app(server, "secret"), raise_server_exceptions=False) as client:
        refused = ask(client, messages=[{"role": "user", "content": "loop"}])
        assert refused.status_code == 400
        message = refused.json()["error"]["message"]
        assert "the chat template has not ended" in message
        assert "set --chat-template to another" in message
        assert ask(client).status_code == 200


def test_fields_that_ask_for_nothing_are_no_error() -> None:
    body = {
        "model": "m", "messages": [{"role": "assistant", "content": "a", "tool_calls": None}], "frequency_penalty": 0.0,
        "tools": [], "user": "me", "seed": None, "response_format": {"type": "text"}, "top_k": -1,
    }  # fmt: skip
    assert parse(ChatRequest, json.dumps(body).encode()).top_k == -1
    neutral = {
        "model": "m", "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": False},
        "min_tokens": 0, "include_stop_str_in_output": False, "add_generation_prompt": True,
        "messages": [
            {"role": "user", "content": "a", "name": "bob"},
            {"role": "assistant", "content": "b", "tool_calls": [], "annotations": [], "reasoning_content": "hm"},
        ],
    }  # fmt: skip
    asked = parse(ChatRequest, json.dumps(neutral).encode())
    assert [m.plain() for m in asked.messages] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message = {"role": "developer", "content": parts}
    joined = parse(ChatRequest, json.dumps({"model": "m", "messages": [message]}).encode()).messages[0].plain()
    assert joined == {"role": "system", "content": "ab"}
    assert parse(CompletionRequest, b'{"model": "m", "prompt": [[1, 2], [3]]}').prompt == [[1, 2], [3]]


def test_alternatives_of_a_completion_name_the_token_and_the_likeliest_of_each_text() -> None:
    class Names:
        def decode(self, tokens: list[int], **_: Any) -> str:
            return "".join({1: "a", 2: "\ufffd", 3: "\ufffd", 4: "b"}[token] for token in tokens)

    answer = Answer("text", "m", Names(), 3, False)
    top = ((2, -0.1), (1, -2.0), (3, -5.0))
    events = [TokenEvent("r", 0, token, logprob, logprob, top, None) for token, logprob in ((4, -7.0), (3, -5.0))]
    completion = Completion("r", 0, (4, 3), (-7.0, -5.0), (0, 0), "length", 1, 0, None, "b\ufffd")
    logprobs = answer.choice(0, completion, events)["logprobs"]
    assert logprobs["top_logprobs"] == [{"\ufffd": -0.1, "a": -2.0, "b": -7.0}, {"\ufffd": -0.1, "a": -2.0}]
    assert logprobs["token_logprobs"] == [-7.0, -5.0]


@pytest.mark.parametrize("stop", [(), ("\n\n",), ("ab", "abc"), ("the cat",)])
def test_pieces_add_up_to_the_text(engine: Engine, stop: tuple[str, ...]) -> None:
    """Tokens chosen so that stop strings begin and do not end, and characters come in parts."""
    text = "a\nab é 数 the the dog\n aba"
    tokens = engine.tokenizer(text)["input_ids"]
    prompt = tuple(engine.tokenizer("x")["input_ids"])
    params = SamplingParams(max_new_tokens=60, stop=stop, seed=4, temperature=3.0)
    engine.add_request(Request(prompt, params), "one")
    pieces, parts, final = PieceStream(engine.tokenizer, stop, True), [], None
    while engine.has_unfinished:
        for event in engine.step():
            parts.append(pieces.push(event))
            final = event.completion
    assert "".join(parts) == final.text
    held_back, shown = PieceStream(engine.tokenizer, stop, True), ""
    for number, token in enumerate(tokens, 1):
        shown += held_back.push(TokenEvent("r", 0, token, 0.0, 0.0, (), None))
        so_far = engine.tokenizer.decode(tokens[:number])
        begun = [size for one in stop for size in range(1, len(one)) if so_far.endswith(one[:size])]
        if not so_far.endswith("\ufffd"):
            assert shown == so_far[: len(so_far) - max(begun, default=0)]


def test_the_key_comes_from_option_environment_file_or_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INFIR2_API_KEY", raising=False)
    generated, shown = api_key(None, None)
    assert shown
    assert len(generated) >= 32
    assert api_key(None, None)[0] != generated
    file = tmp_path / "key"
    made = api_key(None, file)
    assert made == (file.read_text().strip(), False)
    assert api_key(None, file) == made
    assert file.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("INFIR2_API_KEY", "from-environment")
    assert api_key(None, file) == ("from-environment", False)
    assert api_key("given", file) == ("given", False)
    for bad in ("", "two words", "schlüssel", "line\nbreak"):
        with pytest.raises(ConfigError, match="HTTP header cannot carry"):
            api_key(bad, None)


@pytest.mark.parametrize("port", [-1, 65_536, 99_999])
def test_a_port_that_does_not_exist_is_named(port: int) -> None:
    with pytest.raises(ConfigError, match=f"--port: {port} is not between 0 and 65535"):
        listen("127.0.0.1", port)


@pytest.mark.parametrize("grace", ["nan", "inf", "-1"])
def test_a_grace_that_is_no_time_is_named(grace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "gone", "--grace", grace]) == 2
    assert f"--grace {float(grace)}: give seconds" in capsys.readouterr().err
