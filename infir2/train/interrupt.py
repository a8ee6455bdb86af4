"""Whether a run goes on: signals that ask for a stop, and failures of single processes, made known to all of them."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from infir2.errors import TrainingStopped, UserError
from infir2.parallel.runtime import World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interrupt:
    """While entered, SIGTERM, SIGINT and SIGHUP (the terminal has gone; unless nohup has it ignored) are noted for the
    next ``check``; a second SIGINT interrupts at once.

    ``poll`` raises UserError where this process's background save has failed; ``finish`` waits for it first.
    """

    def __init__(self, world: World, poll: Callable[[], None], finish: Callable[[], None]) -> None:
        self._world, self._poll, self._finish = world, poll, finish
        self._got: dict[int, bool] = dict.fromkeys(SIGNALS, False)
        self._failure: UserError | None = None
        self._before: dict[int, Any] = {}

    def check(self) -> signal.Signals | None:
        """The signal that any process got since the beginning. Collective: the answer is the same everywhere.

        Raises on every process where one has failed: what failed here, else that another one has.
        """
        with self.deferring():
            self._poll()
        # In host memory: the processes agree without waiting for their GPUs.
        mine = torch.tensor([*self._got.values(), self._failure is not None], dtype=torch.int64)
        *got, failures = self._world.all_sum(mine).tolist()
        if failures:
            if self._failure is None:
                self._finish()  # raises too, where it was a save that failed
            raise self._failure or TrainingStopped("another process of this run failed; its message says why")
        return next((number for number, count in zip(SIGNALS, got) if count), None)

    def noticed(self) -> bool:
        """Whether this process has got a signal, or has failed: the others may know nothing of it yet."""
        with self.deferring():
            self._poll()
        return any(self._got.values()) or self._failure is not None

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Keep a UserError raised inside for the next ``check``, where no other process waits for this one."""
        try:
            yield
        except UserError as error:
            self._failure = self._failure or error

    def __enter__(self) -> "Interrupt":
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread: whoever runs this one handles signals
                break
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and any(self._got.values()):
            raise KeyboardInterrupt
        self._got[number] = True
