"""Bars on the terminal for work that takes longer than one likes to wait without a sign.

They are drawn on stderr, vanish at the end, and are left out where stderr is no terminal.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

PATIENCE = 2.0
"""Seconds until a bar shows that is not needed for work that is soon done."""


class Report(Protocol):
    """Told how much is done of how much (0: unknown), and, where that changes, of what."""

    def __call__(self, done: float, total: float, what: str | None = None) -> None: ...


@contextmanager
def bytes_bar(console: Console, what: str, after: float = PATIENCE) -> Iterator[Report]:
    """A bar of bytes, with their rate, that shows after so many seconds; none where ``console`` is quiet."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with _bar(what, columns, console.quiet, after) as report:
        yield report


@contextmanager
def count_bar(console: Console, what: str) -> Iterator[Report]:
    """A bar of things that are counted; none where ``console`` is quiet."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with _bar(what, columns, console.quiet) as report:
        yield report


@contextmanager
def share_bar(what: str, show: bool) -> Iterator[Callable[[float], None]]:
    """A bar that is told the share that is done, from 0 to 1."""
    with _bar(what, (BarColumn(), TaskProgressColumn(), TimeRemainingColumn()), not show) as report:
        yield lambda share: report(share, 1.0)


def by_pieces(report: Report, total: int) -> Callable[[int], None]:
    """For work that tells the size of every piece that is done."""
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        report(done, total)

    return advance


@contextmanager
def _bar(what: str, columns: tuple[ProgressColumn, ...], quiet: bool, after: float = 0.0) -> Iterator[Report]:
    console = Console(stderr=True, quiet=quiet)
    bar = Progress(TextColumn("{task.description}"), *columns, console=console, transient=True)
    task, started, shown = bar.add_task(what, total=None), time.monotonic(), False

    def show() -> None:
        nonlocal shown
        if not shown and console.is_terminal and time.monotonic() - started >= after:
            shown = True
            bar.start()

    def report(done: float, total: float, what: str | None = None) -> None:
        bar.update(task, description=what, completed=done, total=total or None)
        show()

    show()
    try:
        yield report
    finally:
        if shown:
            bar.stop()
