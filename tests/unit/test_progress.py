"""Progress bars: what they tell, and where there are none."""

import io
from typing import Any

import pytest
from rich.console import Console

from infir2.launch import progress


def drawn(monkeypatch: pytest.MonkeyPatch, terminal: bool = True) -> io.StringIO:
    """Where bars are drawn from now on."""
    text = io.StringIO()

    def console(stderr: bool, quiet: bool) -> Console:
        assert stderr
        return Console(file=text, quiet=quiet, force_terminal=terminal, color_system=None, width=120)

    monkeypatch.setattr(progress, "Console", console)
    return text


def test_each_bar_tells_how_far_the_work_is(monkeypatch: pytest.MonkeyPatch) -> None:
    text = drawn(monkeypatch)
    with progress.bytes_bar(Console(), "loading", after=0) as report:
        report(3_000_000, 12_000_000)
    with progress.count_bar(Console(), "questions") as report:
        report(0, 0)
        report(5, 8, "answers")
    with progress.share_bar("reading", show=True) as share:
        share(0.25)
    for words in ("loading", "3.0/12.0 MB", "answers", "5/8", "reading", "25%"):
        assert words in text.getvalue(), words


@pytest.mark.parametrize("case", ["soon done", "quiet", "no terminal"])
def test_no_bar_where_none_is_wanted(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = drawn(monkeypatch, terminal=case != "no terminal")
    options: dict[str, Any] = {} if case == "soon done" else {"after": 0}
    with progress.bytes_bar(Console(quiet=case == "quiet"), "loading", **options) as report:
        report(1, 2)
    with progress.share_bar("reading", show=False) as share:
        share(0.5)
    assert text.getvalue() == ""


def test_what_is_counted_is_told_in_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most one in ten seconds; one a minute after ten minutes."""
    text, now = drawn(monkeypatch, terminal=False), 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.count_bar(Console(), "model: [task]") as report:
        for seconds in range(0, 721, 4):
            now = float(seconds)
            report(seconds, 2000)
    lines = text.getvalue().splitlines()
    assert lines[0] == "model: [task]: 12/2,000 after 12 s"
    assert len(lines) == 600 // 12 - 1 + 2
    assert lines[-1] == "model: [task]: 708/2,000 after 708 s"
    with progress.count_bar(Console(quiet=True), "model") as report:
        now += 100
        report(1, 2)
    assert text.getvalue().splitlines() == lines
