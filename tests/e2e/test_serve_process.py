"""A real `infir2 serve` process, with the real openai client, with rude clients, and with many of both at once."""

import asyncio
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import small_chat

from infir2.evaluate.server import LocalServer

pytestmark = pytest.mark.slow
OPTIONS = ["--dtype", "float32", "--cache-tokens", "8192", "--max-sequences", "64", "--name", "small"]
MESSAGES = [{"role": "user", "content": "What is 2 + 3?"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_chat.write_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[LocalServer]:
    with LocalServer(str(model), OPTIONS, timeout_s=120) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: LocalServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key=server.api_key, max_retries=0, timeout=60) as made:
        yield made


def metric(server: LocalServer, name: str) -> float:
    text = asyncio.run(talk(server, b"", "GET", "/metrics")).body.decode()
    return sum(float(value) for value in re.findall(rf"^infir2_{name}(?:{{.*}})? (\S+)$", text, flags=re.MULTILINE))


def until_nothing_is_held(server: LocalServer) -> None:
    names = ("sequences_running", "sequences_waiting", "cache_blocks_held", "open_streams", "http_requests_in_flight")
    deadline = time.monotonic() + 30
    while held := {name: value for name in names if (value := metric(server, name))}:
        assert time.monotonic() < deadline, held
        time.sleep(0.05)


# ---- the openai client


def test_chat(client: openai.OpenAI, server: LocalServer) -> None:
    asked: Any = {"model": "small", "messages": MESSAGES, "max_tokens": 12, "seed": 5, "temperature": 0.8}
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (12, answer.usage.prompt_tokens + 12)
    again = client.chat.completions.create(**asked)
    assert again.choices[0].message.content == answer.choices[0].message.content
    other = client.chat.completions.create(**{**asked, "seed": 6})
    assert other.choices[0].message.content != answer.choices[0].message.content
    assert [listed.id for listed in client.models.list()] == ["small"]
    assert client.models.retrieve("small").id == "small"


def test_a_stream_adds_up_to_the_whole_answer(client: openai.OpenAI) -> None:
    asked: Any = {"model": "small", "messages": MESSAGES, "max_tokens": 40, "seed": 1, "n": 3, "logprobs": True}
    whole = client.chat.completions.create(**asked)
    texts, tokens, reasons = [""] * 3, [[] for _ in range(3)], [None] * 3
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        assert chunk.usage is None
        assert reasons[choice.index] is None, "a choice went on after its end"
        texts[choice.index] += choice.delta.content or ""
        tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
        reasons[choice.index] = choice.finish_reason
    for index, choice in enumerate(whole.choices):
        assert texts[index] == choice.message.content
        assert [t.logprob for t in tokens[index]] == pytest.approx([t.logprob for t in choice.logprobs.content])
        assert reasons[index] == choice.finish_reason
    assert len({choice.message.content for choice in whole.choices}) == 3
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_logprobs_name_the_likeliest_tokens(client: openai.OpenAI) -> None:
    asked: Any = {"model": "small", "max_tokens": 6, "temperature": 0}
    chat = client.chat.completions.create(**asked, messages=MESSAGES, logprobs=True, top_logprobs=3)
    for token in chat.choices[0].logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob == max(top.logprob for top in token.top_logprobs)
    plain = client.completions.create(**asked, prompt="What is", logprobs=2).choices[0]
    assert "".join(plain.logprobs.tokens) == plain.text
    assert plain.logprobs.text_offset[1] == len(plain.logprobs.tokens[0])
    assert plain.logprobs.token_logprobs == pytest.approx([max(top.values()) for top in plain.logprobs.top_logprobs])
    sampled = client.completions.create(
        model="small", prompt="What is", max_tokens=20, temperature=5.0, logprobs=0, seed=1
    )
    greedy = client.completions.create(model="small", prompt="What is", max_tokens=20, temperature=0, logprobs=0)
    means = [sum(one.choices[0].logprobs.token_logprobs) / 20 for one in (sampled, greedy)]
    assert means[0] < means[1] - 1, "log-probabilities are the model's own, so hot samples look unlikely"


def test_stop_strings_never_show_not_even_in_part(client: openai.OpenAI) -> None:
    asked: Any = {"model": "small", "prompt": "What", "max_tokens": 150, "seed": 3}
    asked["extra_body"] = {"ignore_eos": True}
    free = client.completions.create(**asked).choices[0].text
    stop = re.search(r"[!-~]{3}", free[10:])[0]
    cut = client.completions.create(**asked, stop=[stop, "never there"])
    assert cut.choices[0].text == free[: free.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**asked, stop=stop, stream=True)]
    assert "".join(pieces) == free[: free.index(stop)]
    asked["extra_body"]["return_token_ids"] = True
    token = client.completions.create(**asked).choices[0].token_ids[7]
    asked["extra_body"]["stop_token_ids"] = [token]
    ended = client.completions.create(**asked)
    assert token not in ended.choices[0].token_ids
    assert ended.choices[0].finish_reason == "stop"


def test_several_prompts_in_one_request(client: openai.OpenAI) -> None:
    asked: Any = {"model": "small", "max_tokens": 8, "seed": 2, "n": 2}
    both = client.completions.create(**asked, prompt=["The cat", "The dog"])
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    alone = client.completions.create(**asked, prompt="The dog")
    assert [choice.text for choice in both.choices[2:]] == [choice.text for choice in alone.choices]
    streamed = [""] * 4
    for chunk in client.completions.create(**asked, prompt=["The cat", "The dog"], stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in both.choices]


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"model": "gpt-5"}, 404, "'gpt-5' is not served here"),
        ({"tmeperature": 1}, 400, "tmeperature: unknown parameter. Did you mean 'temperature'?"),
        ({"temperature": -1}, 400, "temperature: input should be greater than or equal to 0"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty: this server does not support it beyond 0"),
        ({"tools": [{"type": "function"}]}, 400, "tools: this server does not support it"),
        ({"max_tokens": 100_000}, 400, "max_tokens: 100000 is above"),
        ({"n": 1000}, 400, "exceed the limit of 128"),
        ({"messages": []}, 400, "messages: list should have at least 1 item"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, 400, "prompt and completion together may have 1024"),
        ({"top_logprobs": 2}, 400, "top_logprobs: needs logprobs to be true"),
        ({"stop": ""}, 400, "stop: an empty string"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options: needs stream to be true"),
    ],
)  # fmt: skip
def test_bad_requests_are_told_what_is_wrong(
    client: openai.OpenAI, changes: dict[str, Any], status: int, message: str
) -> None:
    asked = {"model": "small", "messages": MESSAGES, "max_tokens": 4, **changes}
    with pytest.raises(openai.APIStatusError) as caught:
        client.post("/chat/completions", cast_to=object, body=asked)
    assert caught.value.status_code == status
    assert message in caught.value.body["message"]
    assert caught.value.type in ("invalid_request_error", "not_found_error")


def test_a_wrong_key(server: LocalServer) -> None:
    for key in ("wrong", server.api_key + "x", server.api_key[:-1]):
        other = openai.OpenAI(base_url=server.url, api_key=key, max_retries=0)
        with other, pytest.raises(openai.AuthenticationError):
            other.models.list()


# ---- rude clients


@dataclass(frozen=True)
class Reply:
    status: int
    body: bytes


async def talk(
    server: LocalServer, body: bytes, method: str = "POST", path: str = "/v1/chat/completions",
    announce: int | None = None, leave_after: int | None = None,
) -> Reply:  # fmt: skip
    """One request on a connection of its own. ``leave_after``: hang up after so many bytes of the reply."""
    host, port = re.fullmatch(r"http://(.*):(\d+)/v1", server.url).groups()
    reader, writer = await asyncio.open_connection(host, int(port))
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {server.api_key}\r\nConnection: close\r\n"
    )
    writer.write(f"{head}Content-Length: {len(body) if announce is None else announce}\r\n\r\n".encode() + body)
    await writer.drain()
    try:
        if leave_after is not None:
            if leave_after:
                await reader.readexactly(leave_after)
            return Reply(0, b"")
        raw = await reader.read()
    finally:
        writer.close()
    head, _, rest = raw.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head.lower():
        rest = b"".join(re.findall(rb"[0-9a-f]+\r\n(.*?)\r\n(?=[0-9a-f]+\r\n)", rest, flags=re.DOTALL))
    return Reply(int(head.split()[1]), rest)


def request_body(number: int, **changes: Any) -> bytes:
    content = f"What is {number} + {number * 7 % 13}? " + "The cat sat. " * (number % 11)
    asked = {"model": "small", "messages": [{"role": "user", "content": content}], "seed": number, "max_tokens": 40}
    return json.dumps({**asked, "stream": number % 3 == 0, **changes}).encode()


MALFORMED = [b"{", b"not json", b'{"model": "small"}', b"[]", b"\xff\xfe\x00", b'{"model":"small","messages":"hi"}']


def test_two_hundred_clients_of_whom_many_behave_badly(server: LocalServer) -> None:
    """20 % hang up (at once, in mid-body, in mid-answer), 5 % send nonsense; all others get their answer, and the same
    as if they were alone. Afterwards nothing is held."""
    rude, nonsense = range(0, 200, 5), range(1, 200, 20)
    before = metric(server, "client_disconnects_total")

    async def one(number: int) -> Reply:
        if number in nonsense:
            return await talk(server, MALFORMED[number % len(MALFORMED)])
        if number not in rude:
            return await talk(server, request_body(number))
        if number % 3 == 0:  # in the middle of its own request
            return await talk(server, request_body(number)[:50], announce=5000, leave_after=0)
        if number % 3 == 1:  # at once
            return await talk(server, request_body(number, stream=number % 2 == 0, max_tokens=300), leave_after=0)
        return await talk(server, request_body(number, stream=True, max_tokens=300), leave_after=400)

    async def everybody() -> list[Reply]:
        return await asyncio.gather(*map(one, range(200)))

    replies = asyncio.run(everybody())
    assert {replies[number].status for number in nonsense} == {400}
    answered = [number for number in range(200) if number not in rude and number not in nonsense]
    assert len(answered) == 150
    refused = {number: replies[number] for number in answered if replies[number].status != 200}
    assert not refused, "requests and what they were told"
    for number in answered:
        check_whole(replies[number].body, streamed=number % 3 == 0)
    until_nothing_is_held(server)
    assert metric(server, "client_disconnects_total") - before == len(rude)
    assert metric(server, "engine_faults_total") == 0
    for number in answered[::15]:
        alone = asyncio.run(talk(server, request_body(number)))
        assert text_of(alone.body, number % 3 == 0) == text_of(replies[number].body, number % 3 == 0)


def check_whole(body: bytes, streamed: bool) -> None:
    if streamed:
        assert body.endswith(b"data: [DONE]\n\n")
    else:
        assert json.loads(body)["usage"]["completion_tokens"] >= 1


def text_of(body: bytes, streamed: bool) -> str:
    if not streamed:
        return json.loads(body)["choices"][0]["message"]["content"]
    chunks = [json.loads(line[6:]) for line in body.decode().split("\n\n") if line.startswith("data: {")]
    return "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)


def test_a_body_that_is_too_long_is_not_read(server: LocalServer) -> None:
    announced = asyncio.run(talk(server, b"{}", announce=5 << 20))
    assert announced.status == 413
    assert b"above the limit of 4194304 bytes" in announced.body
    until_nothing_is_held(server)


def test_unknown_paths_and_methods(server: LocalServer) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/docs", 404), ("GET", "/v1/completions", 405)):
        reply = asyncio.run(talk(server, b"", method, path))
        assert reply.status == status
        assert json.loads(reply.body)["error"]["message"].startswith(f"{method} {path}: ")


# ---- the process


def test_sigterm_lets_a_request_finish_and_loopback_is_the_default(model: Path) -> None:
    with LocalServer(str(model), ["--dtype", "float32", "--name", "small"], timeout_s=120) as server:
        assert server.url.startswith("http://127.0.0.1:")

        async def while_it_stops() -> Reply:
            started = asyncio.Event()

            async def ask() -> Reply:
                started.set()
                return await talk(server, request_body(1, max_tokens=200, stream=False))

            asking = asyncio.create_task(ask())
            await started.wait()
            while await asyncio.to_thread(metric, server, "sequences_running") == 0:
                pass
            server.process.send_signal(signal.SIGTERM)
            return await asking

        reply = asyncio.run(while_it_stops())
        assert reply.status == 200
        assert server.process.wait(20) == 0
        assert server.complaints() == ""


def test_a_server_ends_with_the_program_that_started_it(model: Path) -> None:
    with LocalServer(str(model), [], timeout_s=120) as server:
        server.process.stdin.close()
        assert server.process.wait(20) == 0


def test_keys(model: Path, tmp_path: Path) -> None:
    """A key file is made for its owner alone; an address in use is one line."""
    file = tmp_path / "key"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = ["serve", str(model), "--port", str(taken.getsockname()[1]), "--key-file", str(file)]
        environment = {name: value for name, value in os.environ.items() if name != "INFIR2_API_KEY"}
        command = [sys.executable, "-m", "infir2", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr == f"infir2: error: 127.0.0.1:{words[3]}: cannot listen there: Address already in use\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(file.read_text().strip()) >= 32
