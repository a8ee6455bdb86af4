"""Python's garbage collector between steps."""

import gc
import weakref

import pytest

from infir2.train.collection import collecting_between_steps


class Node:
    def __init__(self) -> None:
        self.itself = self


def garbage() -> "weakref.ref[Node]":
    return weakref.ref(Node())


def test_garbage_goes_at_every_fiftieth_step_and_at_no_other_time() -> None:
    with collecting_between_steps() as after:
        assert not gc.isenabled()
        found = garbage()
        for step in range(1, 50):
            after(step)
        assert found() is not None
        after(50)
        assert found() is None
    assert gc.isenabled()


def test_what_becomes_garbage_late_goes_in_the_end() -> None:
    with collecting_between_steps() as after:
        node = Node()
        found = weakref.ref(node)
        after(50)
        del node
        for step in range(51, 1000):
            after(step)
        after(1000)
        assert found() is None


def test_an_error_gives_the_collector_back() -> None:
    with pytest.raises(RuntimeError), collecting_between_steps():
        raise RuntimeError
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with collecting_between_steps(), collecting_between_steps():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
