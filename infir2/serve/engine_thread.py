"""The one thread that owns the engine, and the streams through which requests on the event loop hear from it.

The thread takes commands (add, abort, stop) between two steps and hands every step's tokens to the event loop in one
call. So requests join a batch while it runs, and one that is closed gives its blocks back before the next step.
"""

import asyncio
import logging
import queue
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from types import TracebackType

from infir2.parallel.device import in_short, too_little_memory
from infir2.rollout.engine import Engine
from infir2.rollout.interface import EngineStats
from infir2.rollout.records import Request, RequestError, TokenEvent

_log = logging.getLogger(__name__)


class Overloaded(Exception):
    """As many samples are unfinished as the server takes."""


class EngineFault(Exception):
    """The engine failed, or stops, while it worked on this request."""


@dataclass(frozen=True)
class _Add:
    request_id: str
    request: Request


@dataclass(frozen=True)
class _Abort:
    request_id: str


class _Stop:
    pass


class Stream:
    """The tokens of one request, as they are made. Use it as a context manager: leaving it frees what is unfinished."""

    def __init__(self, owner: "EngineThread", request_id: str, samples: int) -> None:
        self._owner, self.request_id, self.samples = owner, request_id, samples
        self.unfinished = samples  # as the reader knows
        self._to_come = samples  # as the engine has told
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the engine has taken the request; RequestError where it cannot serve it."""
        self._steps: asyncio.Queue[list[TokenEvent] | Exception] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[list[TokenEvent]]:
        """The tokens of each step, until all samples are finished; of several steps together where the reader is slower
        than the engine. Raises EngineFault."""
        await self.accepted
        while self.unfinished:
            events: list[TokenEvent] = []
            while not events or not self._steps.empty():
                step = await self._steps.get()
                if isinstance(step, Exception):
                    raise step
                events += step
            self.unfinished -= sum(event.completion is not None for event in events)
            yield events

    def __enter__(self) -> "Stream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._owner._close(self)

    def _put(self, events: list[TokenEvent]) -> None:
        self._to_come -= sum(event.completion is not None for event in events)
        self._steps.put_nowait(events)

    def _fail(self, error: Exception) -> None:
        """Nothing more will come; a stream that has all of its samples is whole."""
        if not self._to_come:
            return
        self._steps.put_nowait(error)
        if not self.accepted.done():
            self.accepted.set_exception(error)
            self.accepted.exception()  # its reader may have gone; asyncio would complain about that


class EngineThread:
    """Runs ``engine`` from ``start`` to ``stop``; every other method belongs to the event loop that started it."""

    def __init__(self, engine: Engine, max_pending: int) -> None:
        self._engine, self.max_pending = engine, max_pending
        self.stats: EngineStats = engine.stats()
        """As of the last step or command."""
        self.faults = 0
        self._streams: dict[str, Stream] = {}
        self._pending = self._number = 0
        self._commands: queue.SimpleQueue[_Add | _Abort | _Stop] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def open_streams(self) -> int:
        return len(self._streams)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End unfinished requests with an EngineFault, and the thread."""
        self._closed = True
        self._commands.put(_Stop())
        await asyncio.to_thread(self._thread.join)
        self._fail_all(EngineFault("the server is stopping"))

    def submit(self, request: Request) -> Stream:
        """Hand a request to the engine. Raises Overloaded, and EngineFault when the engine has stopped."""
        if self._closed or not self.alive:
            raise EngineFault("the server is stopping" if self._closed else "the engine has died; see the server's log")
        if self._pending + request.params.n > self.max_pending:
            raise Overloaded(f"{self._pending} samples are unfinished, and the server takes {self.max_pending}; retry")
        self._number += 1
        stream = Stream(self, f"http-{self._number}", request.params.n)
        self._streams[stream.request_id] = stream
        self._pending += stream.samples
        self._commands.put(_Add(stream.request_id, request))
        return stream

    # ---- on the event loop

    def _close(self, stream: Stream) -> None:
        if self._streams.pop(stream.request_id, None) is not None:
            self._pending -= stream.samples
            if stream.unfinished:
                self._commands.put(_Abort(stream.request_id))

    def _deliver(self, steps: dict[str, list[TokenEvent]], stats: EngineStats) -> None:
        self.stats = stats
        for request_id, events in steps.items():
            if stream := self._streams.get(request_id):
                stream._put(events)

    def _accepted(self, request_id: str) -> None:
        if (stream := self._streams.get(request_id)) and not stream.accepted.done():
            stream.accepted.set_result(None)

    def _refused(self, request_id: str, error: RequestError) -> None:
        if stream := self._streams.get(request_id):
            stream.unfinished = 0
            stream._fail(error)

    def _fail_all(self, error: EngineFault) -> None:
        for stream in self._streams.values():
            stream._fail(error)

    def _fault(self, message: str, waiting: frozenset[str], stats: EngineStats) -> None:
        """A step failed. Whom it did not touch goes on: who waits in the engine or has not got there yet."""
        self.faults, self.stats = self.faults + 1, stats
        for stream in self._streams.values():
            if stream.accepted.done() and stream.request_id not in waiting:
                stream._fail(EngineFault(message))

    def _died(self, stats: EngineStats) -> None:
        self.faults, self.stats = self.faults + 1, stats
        self._fail_all(EngineFault("the engine has died; see the server's log"))

    # ---- on the engine's thread

    def _run(self) -> None:
        try:
            while self._obey():
                self._step()
        except BaseException:
            _log.exception("the engine's thread has died")
            self._tell(self._died, self._engine.stats())
            raise

    def _obey(self) -> bool:
        """Carry out the commands that have arrived; wait for one where there is nothing else to do. False: stop."""
        engine = self._engine
        while True:
            try:
                command = self._commands.get(block=not engine.has_unfinished)
            except queue.Empty:
                return True
            if isinstance(command, _Stop):
                return False
            if isinstance(command, _Abort):
                engine.abort(command.request_id)
                self._tell(self._deliver, {}, engine.stats())
                continue
            try:
                engine.add_request(command.request, command.request_id)
                self._tell(self._accepted, command.request_id)
            except RequestError as error:
                self._tell(self._refused, command.request_id, error)

    def _step(self) -> None:
        engine = self._engine
        try:
            steps: dict[str, list[TokenEvent]] = defaultdict(list)
            for event in engine.step():
                steps[event.request_id].append(event)
            self._tell(self._deliver, dict(steps), engine.stats())
        except Exception as error:  # one bad step must not take down the server: those in it are told, others go on
            message, waiting = f"the engine failed: {self._logged(error)}", engine.abort_running()
            self._tell(self._fault, message, waiting, engine.stats())

    def _logged(self, error: Exception) -> str:
        """What the clients are told of a failed step; the log has all of it."""
        if (failure := too_little_memory(error)) is None:
            _log.error("a step of the engine failed", exc_info=error)
            return f"{type(error).__name__}: {error}"
        told = "it needs more memory than its device has"
        _log.error("a step of the engine failed: %s: %s (%s)", told, self._engine.options.smaller(), in_short(failure))
        return told

    def _tell(self, what: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(what, *arguments)
