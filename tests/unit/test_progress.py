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
