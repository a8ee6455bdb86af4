"""A small pool of processes for computations that may never end: each item has a wall-clock limit and is then killed.

A worker (worker_process.py) keeps the heavy imports and forks a child that does the work, so that a kill costs
milliseconds. Should a worker itself fall silent it is replaced, too. Results come back in the order of the items.
"""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from infir2.errors import UserError
from infir2.reward.cores import usable_cores

_START_S = 120.0  # a worker imports sympy, on a busy machine
_GRACE_S = 5.0
_MAX_STARTS = 3


class WorkerPool:
    """Runs items of one kind (``math``, ``reasoning_gym``, ``python:FILE``) in ``workers`` processes, at most
    ``limit_s`` seconds each.

    Starts its processes when it is first used. Thread-safe: one batch at a time.
    """

    def __init__(self, kind: str, limit_s: float, workers: int | None = None) -> None:
        if limit_s <= 0:
            raise ValueError(f"limit_s must be positive, not {limit_s}")
        self.kind, self.limit_s = kind, limit_s
        self.count = workers or max(1, min(8, usable_cores() - 1))
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _stop_all, self._workers)

    def run(self, items: Sequence[Any]) -> list[dict[str, Any]]:
        """For each item (a JSON value) one of ``{"value": ...}``, ``{"error": ...}`` and ``{"timeout": true}``."""
        with self._lock:
            found: list[dict[str, Any] | None] = [None] * len(items)
            waiting = deque(range(len(items)))
            while len(self._workers) < min(self.count, len(items)):
                self._workers.append(_Worker(self.kind, self.limit_s))
            try:
                while any(answer is None for answer in found):
                    self._hand_out(items, waiting)
                    self._collect(found, waiting)
            except BaseException:  # whatever is under way belongs to a batch nobody waits for any more
                _stop_all(self._workers)
                raise
            return [answer for answer in found if answer is not None]

    def _hand_out(self, items: Sequence[Any], waiting: deque[int]) -> None:
        for worker in self._workers:
            if worker.item is None and waiting:
                worker.send(waiting.popleft(), items)

    def _collect(self, found: list[dict[str, Any] | None], waiting: deque[int]) -> None:
        busy = [worker for worker in self._workers if worker.item is not None]
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.replies, selectors.EVENT_READ, worker)
            soonest = min(worker.deadline for worker in busy)
            ready = {key.data for key, _ in selector.select(max(0.0, soonest - time.monotonic()))}
        for worker in busy:
            item = worker.item
            assert item is not None
            answer = worker.receive() if worker in ready else None
            if answer is None and worker not in ready and time.monotonic() < worker.deadline:
                continue
            worker.item = None
            if answer is None:  # silent or gone: replaced; what it was given counts as its limit passed
                answer = {"timeout": True}
                worker.restart()
            found[item] = answer

    def close(self) -> None:
        """End the processes. The pool can be used again."""
        with self._lock:
            _stop_all(self._workers)


def _stop_all(workers: "list[_Worker]") -> None:
    for worker in workers:
        worker.stop()
    workers.clear()


class _Worker:
    """One process and the item it is busy with."""

    def __init__(self, kind: str, limit_s: float) -> None:
        self.kind, self.limit_s = kind, limit_s
        self.item: int | None = None
        self.deadline = 0.0
        self._idle_starts = 0  # starts since the last answer
        self._start()

    def _start(self) -> None:
        # -I ignores PYTHONPATH, where the packages may lie that this process has.
        named = [os.path.abspath(folder) for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
        folders = [str(Path(__file__).parents[2]), *named]
        code = f"import sys; sys.path[:0] = {folders!r}; from infir2.reward.worker_process import main; main()"
        self._fresh = True
        self._idle_starts += 1
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", code, self.kind, str(self.limit_s)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0, start_new_session=True,
            env={"PATH": os.environ.get("PATH", ""), "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self._process.stdin
        assert self._process.stdout
        self.requests: IO[bytes] = self._process.stdin
        self.replies: IO[bytes] = self._process.stdout
        self._partial = b""

    def send(self, item: int, items: Sequence[Any]) -> None:
        self.item = item
        self.deadline = time.monotonic() + self.limit_s + (_START_S if self._fresh else _GRACE_S)
        line = memoryview(json.dumps(items[item]).encode() + b"\n")
        with contextlib.suppress(BrokenPipeError):  # a process that has gone is seen when its reply is awaited
            while line:  # a signal may cut a long write short
                line = line[self.requests.write(line) :]

    def receive(self) -> dict[str, Any] | None:
        """The reply; None if the process has gone. Replies are one line, written at once by code that we trust."""
        while not self._partial.endswith(b"\n"):
            chunk = os.read(self.replies.fileno(), 65536)
            if not chunk:
                return None
            self._partial += chunk
        reply, self._partial = json.loads(self._partial), b""
        self._fresh, self._idle_starts = False, 0
        return reply

    def restart(self) -> None:
        self.stop()
        if self._idle_starts >= _MAX_STARTS:
            raise UserError(
                f"the {self.kind} worker process does not start; "
                f'try `python -c "import infir2.reward.worker_process as w; w.load({self.kind!r})"` to see why'
            )
        self._start()

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, 9)
        self._process.wait()
        self.requests.close()
        self.replies.close()
