"""Bars on the terminal for work that takes longer than one likes to wait without a sign.

They are drawn on stderr and vanish at the end. Where stderr is no terminal, what is counted is told in a line now and
then, and the others are left out.
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
LINE_SECONDS = (10.0, 60.0)
"""Between two lines where there is no terminal: in the first ten minutes, and after them."""


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
    """A bar of things that are counted, or lines where there is no terminal; none where ``console`` is quiet."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with _bar(what, columns, console.quiet, lines=True) as report:
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
def _bar(
    what: str, columns: tuple[ProgressColumn, ...], quiet: bool, after: float = 0.0, lines: bool = False
) -> Iterator[Report]:
    console = Console(stderr=True, quiet=quiet)
    bar = Progress(TextColumn("{task.description}"), *columns, console=console, transient=True)
    task, started, shown = bar.add_task(what, total=None), time.monotonic(), False
    told = _Lines(console, what) if lines and not console.is_terminal else None

    def show() -> None:
        nonlocal shown
        if not shown and console.is_terminal and time.monotonic() - started >= after:
            shown = True
            bar.start()

    def report(done: float, total: float, what: str | None = None) -> None:
        bar.update(task, description=what, completed=done, total=total or None)
        show()
        if told is not None:
            told.report(done, total, what)

    show()
    try:
        yield report
    finally:
        if shown:
            bar.stop()


class _Lines:
    """What a bar would show, in a line now and then: for a file, a pipe, a job's log."""

    def __init__(self, console: Console, what: str) -> None:
        self.console, self.what = console, what
        self.started = self.told = time.monotonic()

    def report(self, done: float, total: float, what: str | None) -> None:
        self.what, now = what or self.what, time.monotonic()
        if now - self.told < LINE_SECONDS[0 if now - self.started < 600 else 1]:
            return
        self.told = now
        of = f"/{total:,.0f}" if total else ""
        text = f"{self.what}: {done:,.0f}{of} after {now - self.started:,.0f} s"
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
