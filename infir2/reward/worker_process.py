"""Runs inside a worker: a supervisor that never touches untrusted input, and a child that does and can be killed.

The child gives up its rights first, as far as the machine lets it: it cannot write files, open sockets, start programs
or send signals, and reads only the interpreter's folders. It is a second line: what must not be evaluated at all is
turned away before (tasks.py). Its memory is bounded.
"""

import contextlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any, NoReturn

MEMORY_MIB = 4096
_REPLY_BYTES = 1 << 20


def main() -> NoReturn:
    """argv: kind, limit in seconds. One JSON item a line on stdin, one JSON reply a line on stdout."""
    compute, limit_s = load(sys.argv[1]), float(sys.argv[2])
    child = None
    for line in iter(sys.stdin.buffer.readline, b""):
        if child is None:
            child = _Child(compute, limit_s)
        reply = child.ask(line)
        if not reply:
            child.kill()
            child = None
        sys.stdout.buffer.write(reply or b'{"timeout": true}\n')
        sys.stdout.buffer.flush()
    if child:
        child.kill()
    os._exit(0)


def load(kind: str) -> Callable[[Any], Any]:
    """The function that computes an item of this kind, with everything it needs imported."""
    if kind == "math":
        return load_math()
    if kind == "reasoning_gym":
        return load_reasoning_gym()
    if kind.startswith("python:"):
        return load_file(kind.removeprefix("python:"))
    if kind == "sleep":  # for tests: an item tells how long
        return _sleep
    raise ValueError(f"no such kind of work: {kind!r}")


def _sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def load_math() -> Callable[[Any], bool]:
    """(label, answer) in LaTeX -> whether they mean the same, by math-verify."""
    import logging

    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    sys.setrecursionlimit(3000)

    def equal(item: Any) -> bool:
        label, answer = (_parsed(text) for text in item)
        # no timeouts of its own: they need SIGALRM, and the limit of this process is harder
        return bool(label and answer and verify(label, answer, timeout_seconds=None))

    def _parsed(text: str) -> list[Any]:
        config = [LatexExtractionConfig(boxed_match_priority=-1)]
        return parse(f"${text}$", extraction_config=config, fallback_mode="no_fallback", parsing_timeout=None)

    equal(["\\frac{1}{2}", "0.5"])  # what is imported late is imported now
    return equal


def load_reasoning_gym() -> Callable[[Any], float]:
    """(data set, entry, answer) -> the library's score in [0, 1]; 0 for an answer that only takes it in."""
    from reasoning_gym.factory import get_score_answer_fn

    from infir2.reward.loopholes import solves

    scorers: dict[str, Callable[..., float]] = {}

    def score(item: Any) -> float:
        name, entry, answer = item
        if not solves(name, entry, answer):
            return 0.0
        if name not in scorers:
            scorers[name] = get_score_answer_fn(name)
        return float(scorers[name](answer=answer, entry=entry))

    return score


def load_file(path: str) -> Callable[[Any], float]:
    """(response, label) -> what ``score`` of that Python file says. What lies beside the file can be imported."""
    sys.path.insert(0, os.path.dirname(path))
    spec = spec_from_file_location("reward_of_the_user", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for replies
        spec.loader.exec_module(module)
    return lambda item: float(module.score(*item))


class _Child:
    """The process that computes, and the two pipes to it."""

    def __init__(self, compute: Callable[[Any], Any], limit_s: float) -> None:
        self.limit_s = limit_s
        items, self.items = os.pipe()
        self.replies, replies = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.items)
            os.close(self.replies)
            _compute_forever(compute, items, replies, limit_s)
        os.close(items)
        os.close(replies)

    def ask(self, line: bytes) -> bytes:
        """The reply line; empty if the child died or was too slow."""
        deadline, reply = time.monotonic() + self.limit_s, b""
        with contextlib.suppress(BrokenPipeError):
            os.write(self.items, line) if len(line) <= select.PIPE_BUF else self._write(line, deadline)
        while not reply.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.replies], [], [], left)[0]:
                return b""
            chunk = os.read(self.replies, 65536)
            if not chunk or len(reply) > _REPLY_BYTES:
                return b""
            reply += chunk
        return reply

    def _write(self, line: bytes, deadline: float) -> None:
        while line and time.monotonic() < deadline:
            if select.select([], [self.items], [], 0.1)[1]:
                line = line[os.write(self.items, line[: select.PIPE_BUF]) :]

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.items)
        os.close(self.replies)


def _compute_forever(compute: Callable[[Any], Any], items: int, replies: int, limit_s: float) -> NoReturn:
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        _give_up_rights()
        with os.fdopen(items, "rb") as file:
            for line in iter(file.readline, b""):
                signal.setitimer(signal.ITIMER_REAL, limit_s + 1)  # ends us even if the supervisor has gone
                reply = _answer(compute, line)
                signal.setitimer(signal.ITIMER_REAL, 0)
                os.write(replies, reply)
    finally:
        os._exit(0)


def _answer(compute: Callable[[Any], Any], line: bytes) -> bytes:
    try:
        return json.dumps({"value": compute(json.loads(line))}).encode() + b"\n"
    except Exception as error:  # a parser that stumbles over garbage: no value, and the next item is another matter
        return json.dumps({"error": type(error).__name__, "detail": str(error)[:300]}).encode() + b"\n"


def _give_up_rights() -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if not sys.platform.startswith("linux"):
        return
    from infir2.reward import confine

    confine.limit_resources(memory_mib=MEMORY_MIB, file_mib=1)
    with contextlib.suppress(OSError):
        readable = {os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, *filter(None, sys.path))}
        confine.restrict_files(["/usr", "/lib", "/lib64", "/etc/ld.so.cache", *readable], ["/dev/null"])
    with contextlib.suppress(OSError):
        confine.refuse_system_calls(only_compute=True)
