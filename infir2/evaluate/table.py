"""The figures of an evaluation on the terminal."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from infir2.evaluate.score import Paired, TaskScore


def print_table(
    console: Console,
    models: Sequence[str],
    tasks: Sequence[str],
    scores: Mapping[str, Mapping[str, TaskScore]],
    pairs: Mapping[str, Paired],
) -> None:
    """A row a task and model; below them, of two models that were compared, a line a task.

    ``scores``: model -> task -> score; ``pairs``: task -> the second model against the first.
    """
    table = Table(box=None, pad_edge=False)
    for column in ("task", "model", "problems", "avg@k (95 % interval)", "pass@k", "tokens", "truncated"):
        table.add_column(column, justify="left" if column in ("task", "model") else "right", overflow="fold")
    for task in tasks:
        for name in models:
            score = scores[name][task]
            k = score.samples
            average = f"{score.average:.1%} @{k}  ({_interval(score.low, score.high)})"
            lengths = f"{score.mean_tokens:,.0f}", f"{score.truncated:.0%}"
            table.add_row(task, name, str(score.problems), average, f"{score.pass_at[k]:.1%} @{k}", *lengths)
    console.print(table)
    for task, pair in pairs.items():
        console.print(
            f"{task}: {models[1]} minus {models[0]}: {pair.difference:+.1%} "
            f"({_interval(pair.low, pair.high, '+')}), p = {pair.p_value:.3f}, "
            f"better on {pair.better} and worse on {pair.worse} of {pair.problems} problems"
        )


def _interval(low: float | None, high: float | None, sign: str = "") -> str:
    """A dash where there is none."""
    return "–" if low is None or high is None else f"{low:{sign}.1%} to {high:{sign}.1%}"
