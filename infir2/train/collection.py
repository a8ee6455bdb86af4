"""Python's garbage collector, run between steps instead of in the middle of one.

A full collection stops the host for tens of milliseconds: a GPU that is fed call by call runs dry meanwhile, and under
torchrun every rank stops at another time and the others wait.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_EVERY = 50  # steps between two collections
_OF_ALL_EVERY = 1000  # steps between two that also look at what has survived one: else its garbage would pile up


@contextmanager
def collecting_between_steps() -> Iterator[Callable[[int], None]]:
    """Within it nothing is collected but by the function that it gives, to be called with the step after every step."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()

    def after(step: int) -> None:
        if step % _OF_ALL_EVERY == 0:
            gc.collect()
        elif step % _EVERY == 0:
            gc.collect(1)  # only what is young: milliseconds

    try:
        yield after
    finally:
        if enabled:
            gc.enable()
