"""Plots as SVG text that takes its colours from the page, so that one drawing serves light and dark.

matplotlib knows only fixed colours: we draw with stand-in colours and replace each by a CSS variable of the page
(INK for text, GRID for lines, SERIES for runs, HEAT for cells). Every plot is drawn twice, wide and narrow, because
text that is scaled down from a desktop cannot be read on a phone; the page shows one of the two.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, MaxNLocator

SERIES = [f"#0a00{n:02x}" for n in range(8)]
HEAT = [f"#0b00{n:02x}" for n in range(6)]
INK, GRID, EMPTY, CARD = "#0c0001", "#0c0002", "#0c0003", "#0c0004"
VARIABLES = {
    **{color: f"var(--series-{n})" for n, color in enumerate(SERIES)},
    **{color: f"var(--heat-{n})" for n, color in enumerate(HEAT)},
    INK: "var(--muted)",
    GRID: "var(--grid)",
    EMPTY: "var(--empty)",
    CARD: "var(--card)",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: the page's font, sharp and selectable
    "text.parse_math": False,  # a name with dollar signs is a name
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}
WIDE, HALF, NARROW = (9.6, 3.5), (4.7, 2.7), (3.7, 2.7)  # inches; 1 inch is 72 px of the drawing
MAX_POINTS = 600


@dataclass(frozen=True)
class Curve:
    """One line of a plot: steps [n] and values [n]; gaps where a value is not finite."""

    series: int
    steps: np.ndarray
    values: np.ndarray
    marks: Sequence[int] = field(default_factory=tuple)
    """Steps to mark at the foot of the plot (resumes)."""


def lines(
    name: str,
    curves: Sequence[Curve],
    *,
    half: bool = False,
    smooth: bool = True,
    log: bool = False,
    points: bool = False,
    zero_line: bool = False,
    settled: bool = False,
    write: Callable[[float], str] | None = None,
) -> dict[str, str]:
    """Curves over steps as {"wide": svg, "narrow": svg}; smooth adds a rolling mean over the raw values.

    ``settled`` fits the frame to what follows the first tenth of the steps, so that a steep start does not flatten
    everything that comes after it.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for curve in curves:
            _draw_curve(axes, curve, smooth, points)
        _limit_y(axes, curves, log, settled)
        for curve in curves:
            _draw_marks(axes, curve)
        if zero_line:
            axes.axhline(0, color=INK, linewidth=1)
        axes.margins(x=0.01)
        axes.grid(False, axis="x")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        if write:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: write(y)))

    return _both(name, HALF if half else WIDE, NARROW, draw)


def heat_map(
    name: str, panels: Mapping[str, Mapping[tuple[str, str], float]], edges: Sequence[float]
) -> dict[str, str]:
    """{panel title: {(row, column): value}} side by side (one below another when narrow), coloured by level.

    ``edges`` are the limits between the six levels, rising or falling; level 0 is the calm end.
    """

    def draw(figure: Figure) -> None:
        stacked = figure.get_figwidth() < WIDE[0]
        shape = (len(panels), 1) if stacked else (1, len(panels))
        grid = figure.subplots(*shape, squeeze=False).flat
        for place, (title, cells) in enumerate(panels.items()):
            _draw_heat(grid[place], title, cells, edges, rows_shown=stacked or place == 0)

    rows = max(len({row for row, _ in cells}) for cells in panels.values())
    height = min(0.17 * rows, 7.0) + 0.7
    return _both(name, (9.6, max(1.5, height)), (3.7, (min(0.12 * rows, 5.0) + 0.7) * len(panels)), draw)


def rolling_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over ``window`` values, fewer at the ends; values that are not finite are left out."""
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    place = np.arange(len(values))
    first, last = np.maximum(place - window // 2, 0), np.minimum(place + window // 2 + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (total[last] - total[first]) / (count[last] - count[first])


def window_for(length: int) -> int:
    """Values averaged for a smoothed curve: 2 % of them, at least 5."""
    return max(5, length // 50)


def _draw_curve(axes: Axes, curve: Curve, smooth: bool, points: bool) -> None:
    color = SERIES[curve.series % len(SERIES)]
    values = np.where(np.isfinite(curve.values), curve.values, np.nan)
    if points:
        axes.plot(curve.steps, values, color=color, linewidth=1.6, marker="o", markersize=4)
        return
    if smooth:
        axes.plot(*_extremes(curve.steps, values), color=color, linewidth=0.6, alpha=0.25)
        values = rolling_mean(values, window_for(len(values)))
    kept = np.unique(np.linspace(0, len(values) - 1, min(len(values), MAX_POINTS)).astype(int))
    axes.plot(curve.steps[kept], values[kept], color=color, linewidth=1.7)


def _draw_marks(axes: Axes, curve: Curve) -> None:
    if curve.marks:
        foot = axes.get_ylim()[0]
        color = SERIES[curve.series % len(SERIES)]
        axes.plot(curve.marks, [foot] * len(curve.marks), "^", color=color, markersize=6, clip_on=False)


def _extremes(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest value of each stretch: a long run keeps its spikes in few points."""
    if len(steps) <= MAX_POINTS:
        return steps, values
    pieces = np.array_split(np.arange(len(steps)), MAX_POINTS // 2)
    filled = np.nan_to_num(values, nan=np.nanmedian(values))
    kept = sorted({int(p[at]) for p in pieces for at in (filled[p].argmin(), filled[p].argmax())})
    return steps[kept], values[kept]


def _limit_y(axes: Axes, curves: Sequence[Curve], log: bool, settled: bool) -> None:
    """A frame for the body of the values: the highest and lowest 0.5 % (a first step, a spike) may leave it."""
    start = 0.1 * max(curve.steps[-1] for curve in curves) if settled else 0
    finite = [curve.values[np.isfinite(curve.values) & (curve.steps >= start)] for curve in curves]
    low = min((np.percentile(v, 0.5) for v in finite if len(v)), default=0.0)
    high = max((np.percentile(v, 99.5) for v in finite if len(v)), default=1.0)
    if log and low > 0 and high / low > 20:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.3, high * 1.3)
        return
    margin = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
    axes.set_ylim(low - margin, high + margin)
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _draw_heat(
    axes: Axes, title: str, cells: Mapping[tuple[str, str], float], edges: Sequence[float], rows_shown: bool
) -> None:
    rows, columns = list(dict.fromkeys(r for r, _ in cells)), list(dict.fromkeys(c for _, c in cells))
    sign = 1 if edges[-1] > edges[0] else -1
    levels = np.full((len(rows), len(columns)), len(HEAT))  # no such layer
    for (row, column), value in cells.items():
        level = np.searchsorted(sign * np.array(edges), sign * value, side="right") if not np.isnan(value) else 5
        levels[rows.index(row), columns.index(column)] = level
    for level, color in enumerate([*HEAT, EMPTY]):  # one path a level: a path a cell makes a heavy page
        cells_here = np.argwhere(levels == level)
        boxes = [Path([(x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1), (x, y)]) for y, x in cells_here]
        if boxes:
            axes.add_patch(PathPatch(Path.make_compound_path(*boxes), facecolor=color, edgecolor=CARD, linewidth=1.2))
    axes.set_xlim(0, len(columns))
    axes.set_ylim(0, len(rows))
    axes.set_title(title, loc="left")
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
    every = max(1, len(rows) // 8)
    axes.set_yticks(np.arange(0, len(rows), every) + 0.5, rows[::every] if rows_shown else [""] * len(rows[::every]))
    if rows_shown:
        axes.set_ylabel("layer")


def _both(
    name: str, wide: tuple[float, float], narrow: tuple[float, float], draw: Callable[[Figure], None]
) -> dict[str, str]:
    return {kind: _svg(f"{name}-{kind}", size, draw) for kind, size in (("wide", wide), ("narrow", narrow))}


def _svg(name: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    """Draw and return one <svg> element, deterministic, with ids that no other drawing of the page has."""
    text = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(text.getvalue())


def _for_page(svg: str) -> str:
    """What matplotlib wrote, without what the page itself decides: size, fonts, colours, and groups' repeated ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path.group()), svg)  # 0.01 px is enough
    return re.sub(r"#0[abc]00[0-9a-f]{2}", lambda match: VARIABLES[match.group()], svg)
