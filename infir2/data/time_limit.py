"""A chat template comes with a stranger's model and may loop for ever: what has not ended in time is interrupted.

Jinja's sandbox bounds what one range() makes, but not loops within loops, or macros that call themselves. A thread that
ticks raises the exception in the one that renders, whichever that is: signals reach only a process's main thread.
"""

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

LIMIT_S = 10
"""Templates take milliseconds, for the longest conversations too."""

_lock = threading.Lock()
_running: dict[int, int] = {}
"""Threads inside ``time_limit``, and the ticks that each has been there: seconds in which this process ran."""
_ticker = threading.Thread()

_raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
_raise_in.argtypes = (ctypes.c_ulong, ctypes.py_object)


class TookTooLong(BaseException):
    """Internal: the block of ``time_limit`` had not ended. No Exception: Jinja takes any in a constant expression for a
    sign that it is none, and goes on."""


@contextmanager
def time_limit() -> Iterator[None]:
    """Raise TookTooLong in the block after LIMIT_S seconds, between two steps of Python: a single call of C goes on."""
    thread = threading.get_ident()
    with _lock:
        _running[thread] = 0
        _keep_ticking()
    try:
        yield
    finally:
        with _lock:  # from here on nothing is raised in this thread; what was, and has not come yet, is taken back
            _running.pop(thread, None)
            _raise_in(thread, ctypes.py_object())


def _keep_ticking() -> None:
    global _ticker
    if not _ticker.is_alive():  # not started yet, or left behind by a fork
        _ticker = threading.Thread(target=_tick, name="time limit", daemon=True)
        _ticker.start()


def _tick() -> None:
    while True:
        time.sleep(1)
        with _lock:
            for thread in list(_running):
                _running[thread] += 1
                if _running[thread] > LIMIT_S:
                    del _running[thread]
                    _raise_in(thread, TookTooLong)
