"""A bar of bytes for work that may take longer than one likes to wait without a sign."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

SHOW_PROGRESS_AFTER = 2.0
"""Seconds."""


@contextmanager
def byte_progress(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """Yields ``report(done, total)``; the bar shows on stderr when the work has gone on for a while."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True, quiet=console.quiet), transient=True)
    task, started, shown = bar.add_task("", total=None), time.monotonic(), False

    def report(done: int, total: int) -> None:
        nonlocal shown
        bar.update(task, completed=done, total=total)
        if not shown and time.monotonic() - started > SHOW_PROGRESS_AFTER:
            shown = True
            bar.start()

    try:
        yield report
    finally:
        if shown:
            bar.stop()
