"""The progress of a run for the person watching: two updating lines on a terminal, now and then a line elsewhere.

Whoever watched may go, with the terminal or the other end of a pipe. Training goes on; metrics.jsonl has it all.
"""

import atexit
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

REFRESH_SECONDS = 0.1
PLAIN_SECONDS = (10.0, 60.0)  # between two plain lines: in the first ten minutes, and after them


class _Terminal(Console):
    """rich ends the program where a pipe was closed."""

    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError that is being handled


class LiveLine:
    """``update`` after each logged step; ``message`` prints a line that stays; ``close`` leaves the terminal tidy."""

    def __init__(
        self, total_steps: int, *, first_step: int = 0, name: str = "", console: Console | None = None
    ) -> None:
        self.total, self.step, self.name = total_steps, first_step, name
        self.values: dict[str, float] = {}
        self._console = console or _Terminal(file=sys.stdout, highlight=False)
        self._started = self._shown_at = time.monotonic()
        self._shown_step = -1
        self._told_at = self._started
        self.doing = ""
        self._pace = deque([(self._started, first_step)], maxlen=50)
        self._live: Live | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, auto_refresh=False)
            self._show(self._live.start)
            atexit.register(self.close)  # an exception that nobody catches must not leave the cursor hidden

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show a step. Redraws at most ten times a second on a terminal, far more rarely elsewhere."""
        now = time.monotonic()
        self.step, self.doing = step, ""
        self._pace.append((now, step))
        self.remember(values)
        if self._live:
            if now - self._shown_at >= REFRESH_SECONDS or step >= self.total:
                self._shown_at = now
                self._draw()
        elif self._plain_due(now):
            self._shown_at, self._shown_step = now, step
            self._print(self._plain())

    def remember(self, values: Mapping[str, float]) -> None:
        """Keep values (FP8 health, say) for the next update."""
        self.values.update(values)

    def activity(self, text: str) -> None:
        """Show what is going on within a step: at most ten times a second on a terminal, now and then elsewhere."""
        self.doing = text
        now = time.monotonic()
        if self._live and now - self._shown_at >= REFRESH_SECONDS:
            self._shown_at = now
            self._draw()
        elif not self._live and now - max(self._shown_at, self._told_at) >= PLAIN_SECONDS[0]:
            self._told_at = now
            self._print(f"step {self.step + 1}/{self.total}: {text}")

    def message(self, text: str) -> None:
        """A line that stays above the live lines."""
        self._print(text)

    def close(self) -> None:
        """Draw the last state and give the terminal back."""
        self._draw()
        if self._live:
            self._show(self._live.stop)
        self._live = None
        atexit.unregister(self.close)

    def eta_seconds(self) -> float | None:
        """Seconds to the last step at the pace of the last 50 updates, pauses for evaluation included."""
        (then, first), (now, last) = self._pace[0], self._pace[-1]
        return (now - then) / (last - first) * (self.total - last) if last > first else None

    def _plain_due(self, now: float) -> bool:
        pause = PLAIN_SECONDS[now - self._started > 600]
        enough_steps = self.step - self._shown_step >= max(1, self.total // 100)
        return self._shown_step < 0 or enough_steps or now - self._shown_at >= pause or self.step >= self.total

    def _draw(self) -> None:
        if live := self._live:
            self._show(lambda: live.update(self._panel(), refresh=True))

    def _print(self, text: str) -> None:
        def show() -> None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
            self._console.file.flush()

        self._show(show)

    def _show(self, how: Callable[[], object]) -> None:
        try:
            how()
        except OSError:
            self._live, self._console.quiet = None, True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what others still print

    def _plain(self) -> str:
        eta = self.eta_seconds()
        parts = [f"step {self.step}/{self.total}", *(f"{label} {text}" for label, text in readings(self.values))]
        return " | ".join([*parts, f"ETA {duration(eta)}"] if eta is not None else parts)

    def _panel(self) -> RenderableType:
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        eta = self.eta_seconds()
        right = Text(f"{self.doing}  " if self.doing else "", style="dim")
        right.append(f"{self.step}/{self.total}", style="not dim bold")
        right.append(f"  {self.step / max(self.total, 1):.1%}", style="not bold cyan")
        right.append(f"  ETA {duration(eta) if eta is not None else '-'}", style="not bold")
        head.add_row(Text(self.name, style="bold"), ProgressBar(self.total, self.step), right)
        body = [
            Text.assemble((f"{label} ", "dim"), (text, "red" if label == "skipped" else ""), no_wrap=True)
            for label, text in readings(self.values)
        ]
        return Group(head, Columns(body, padding=(0, 3)))


def readings(values: Mapping[str, float]) -> list[tuple[str, str]]:
    """The values worth a glance as (label, text), in reading order; those that are missing are left out."""
    shown = []
    for key, label, write in (
        ("loss", "loss", lambda v: f"{v:.4f}"),
        ("reward", "reward", lambda v: f"{v:.3f}"),
        ("lr", "lr", lambda v: f"{v:.2e}"),
        ("grad_norm", "grad", lambda v: f"{v:.3g}"),
        ("tokens_per_s", "tokens/s", count),
        ("mfu", "MFU", lambda v: f"{v:.1%}"),
        ("peak_memory_gb", "peak", lambda v: f"{v:.1f} GB"),
        ("fp8_underflow", "FP8 underflow", lambda v: f"{v:.2%}"),
        ("fp8_saturation", "FP8 saturated", lambda v: f"{v:.2%}"),
        ("skipped", "skipped", lambda v: f"{v:.0f}"),
    ):
        value = values.get(key)
        if value is not None and not (key in ("skipped", "mfu", "peak_memory_gb") and value == 0):
            shown.append((label, write(value)))
    return shown


def count(value: float) -> str:
    """1234567 -> "1.23M": three digits that count."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            scaled = value / size
            return f"{scaled:.0f}{letter}" if abs(scaled) >= 100 else f"{scaled:.3g}{letter}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """3725 -> "1:02:05"; from two days on "2d 03h"."""
    whole = round(seconds)
    if whole >= 172800:
        return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
