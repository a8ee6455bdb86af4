"""The report itself: chooses what to plot, words the summary, fills the page. One file, no script, no request."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from infir2 import __version__
from infir2.durable import write_output
from infir2.errors import UserError
from infir2.report import plots
from infir2.report.runs import Run, differences, labels_for, read_run
from infir2.train.live import count, duration

UNDERFLOW_EDGES = (1e-4, 1e-3, 1e-2, 5e-2, 0.2)
SQNR_EDGES = (32.0, 30.0, 28.0, 25.0, 20.0)
COMPLETIONS = 4  # shown from the beginning and from the end of a run
MEAN = "mean over layers and operands"
OPERANDS = {"x": "activations", "w": "weights", "g": "gradients"}


def _short(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else ""


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _power(value: float) -> str:
    """0.0001 -> 1e-4."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return "0" if value == 0 else f"{mantissa.removesuffix('.0')}e{int(exponent)}"


# Curves of reinforcement learning: key, title, note, how values are written.
RL_PLOTS = (
    ("response_length", "Response length", "Tokens, mean.", _short),
    ("truncated", "Truncated responses", "Share that reached the limit of tokens.", _percent),
    ("entropy", "Entropy", "Nats a token, at the sampling temperature.", _short),
    ("kept_groups", "Groups trained on", "Of one rollout.", _short),
    ("logprob_diff", "Trainer against engine", "Mean difference of log-probabilities, absolute.", _power),
    ("importance_clipped", "Truncated importance weights", "Share of tokens.", _percent),
)


@dataclass(frozen=True)
class Plot:
    """One figure of the page."""

    title: str
    note: str
    svg: dict[str, str]
    half: bool = False
    legend: Sequence[str] = ()
    """Labels of the six levels of a heat map."""


def write_report(runs: Sequence[Path], out: Path, labels: Sequence[str] | None = None) -> None:
    """Write one self-contained HTML file about one or several run folders.

    Raises UserError, naming the file and the line, where a run folder is missing or broken, or ``out`` cannot be made.
    """
    if not runs:
        raise UserError("no run folder given")
    read = [read_run(Path(path), label) for path, label in zip(runs, labels_for(runs, labels), strict=True)]
    title = read[0].label if len(read) == 1 else " · ".join(run.label for run in read)
    write_page(out, "run_report.html", title, "Training report", {"group": group_of(read)})


def write_page(out: Path, template: str, title: str, kicker: str, content: dict[str, Any]) -> None:
    """Fill a template. Raises UserError where ``out`` cannot be made."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("infir2.report", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["trusted_svg"] = Markup  # only ever our own drawings
    made = datetime.now().strftime("%d %B %Y, %H:%M").lstrip("0")
    html = environment.get_template(template).render(
        title=title, kicker=kicker, made=made, version=__version__, **content
    )
    write_output(out, html.encode(errors="replace").decode())  # answers may hold halves of surrogate pairs


def group_of(runs: Sequence[Run]) -> dict[str, Any]:
    """What the page says about runs that are shown together."""
    return {
        "runs": runs,
        "summary": [_summary(run, runs[0]) for run in runs],
        "plots": _plots(runs),
        "heat_maps": [plot for index, run in enumerate(runs) for plot in _heat_maps(index, run, len(runs) > 1)],
        "completions": [(run, _completions(run)) for run in runs],
        "differences": differences(runs) if len(runs) > 1 else [],
        "environments": [_environment(run) for run in runs],
        "commands": [_command(run) for run in runs],
    }


def _summary(run: Run, first: Run) -> list[tuple[str, str, str]]:
    """(heading, text, change against the first run) of every column of the summary table."""
    steps, _ = run.series("loss")
    time_spent = run.time_in_steps()
    loss, held_out = run.final_loss(), run.last("eval_loss", "eval")
    reward = run.last("eval_reward", "eval")

    def text(value: float | None, form: str, unit: str = "") -> str:
        return "–" if value is None else f"{value:{form}}{unit}"

    def counted(value: float | None) -> str:
        return "–" if value is None else count(value)

    def change(value: float | None, base: float | None) -> str:
        return f"{100 * (value / base - 1):+.2f} %" if run is not first and value and base else ""

    speed, memory = run.middle("tokens_per_s"), run.highest("peak_memory_gb")
    return [
        ("Model", run.model or "–", ""),
        ("Precision", run.precision or "–", ""),
        ("Steps", f"{steps[-1]:,}" if len(steps) else "–", ""),
        ("Tokens", counted(run.last("tokens")), ""),
        ("Training loss", text(loss, ".4f"), change(loss, first.final_loss())),
        ("Held\u2011out loss", text(held_out, ".4f"), change(held_out, first.last("eval_loss", "eval"))),
        ("Tokens/s", counted(speed), change(speed, first.middle("tokens_per_s"))),
        ("MFU", text(run.middle("mfu"), ".1%"), ""),
        ("Peak memory", text(memory, ".1f", "\u00a0GB"), change(memory, first.highest("peak_memory_gb"))),
        ("Time in steps", duration(time_spent) if time_spent else "–", ""),
        *[("Held\u2011out reward", text(reward, ".3f"), change(reward, first.last("eval_reward", "eval")))]
        * (reward is not None),
        ("Skipped", text(run.last("skipped"), ".0f"), ""),
        ("Resumes", str(len(run.steps_of("resume"))), ""),
    ]


def _plots(runs: Sequence[Run]) -> list[Plot]:
    halves = [
        *(_half(runs, key, title, note, write=write) for key, title, note, write in RL_PLOTS),
        _half(runs, "lr", "Learning rate", "", smooth=False, write=_power),
        _half(runs, "grad_norm", "Gradient norm", "Before clipping.", log=True, write=_short),
        _half(runs, "tokens_per_s", "Tokens per second", "Over all devices.", write=count),
        _half(runs, "fp8_underflow", "FP8 underflow", f"Non-zero values that become zero, {MEAN}.", write=_percent),
        _half(runs, "fp8_saturation", "FP8 saturation", f"Values at the largest code, {MEAN}.", write=_percent),
        _half(runs, "fp8_sqnr_db", "FP8 signal to noise", f"Decibels, {MEAN}.", write=_short),
    ]
    found = [plot for plot in halves if plot is not None]
    if len(found) % 2 and (memory := _half(runs, "peak_memory_gb", "Peak memory", "GB.", smooth=False, write=_short)):
        found.append(memory)
    wide = (_reward(runs), _held_out_reward(runs), _loss(runs), _held_out(runs), _difference(runs))
    return [plot for plot in wide if plot is not None] + found


def _reward(runs: Sequence[Run]) -> Plot | None:
    curves = _curves(runs, "reward")
    note = "Mean over all samples of a rollout, groups that were left out included."
    return Plot("Reward", note, plots.lines("reward", curves, write=_short)) if curves else None


def _held_out_reward(runs: Sequence[Run]) -> Plot | None:
    curves = _curves(runs, "eval_reward", "eval")
    note = "Mean over prompts that are never trained on."
    return Plot("Held-out reward", note, plots.lines("held-out-reward", curves, points=True)) if curves else None


def _half(runs: Sequence[Run], key: str, title: str, note: str, **options: Any) -> Plot | None:
    """A plot of half width, or None where there is nothing but zeros to show."""
    health = key.startswith("fp8_")
    curves = _curves(runs, key, "health" if health else "train")
    if not any(np.nanmax(np.abs(curve.values)) > 0 for curve in curves):
        return None
    return Plot(title, note, plots.lines(key, curves, half=True, points=health, **options), half=True)


def _loss(runs: Sequence[Run]) -> Plot | None:
    curves = [
        plots.Curve(curve.series, curve.steps, curve.values, runs[curve.series].steps_of("resume"))
        for curve in _curves(runs, "loss")
    ]
    window = plots.window_for(len(curves[0].steps)) if curves else 0
    note = f"Faint: every step. Bold: rolling mean over {window} logged steps."
    if any(curve.marks for curve in curves):
        note += " A triangle at the foot marks a resume."
    note += " The first steps may lie above the frame."
    return Plot("Training loss", note, plots.lines("loss", curves, settled=True, write=_short)) if curves else None


def _held_out(runs: Sequence[Run]) -> Plot | None:
    curves = _curves(runs, "eval_loss", "eval")
    if not curves:
        return None
    note = "Mean loss a token over documents that are never trained on."
    return Plot("Held-out loss", note, plots.lines("held-out", curves, points=True, settled=True, write=_short))


def _difference(runs: Sequence[Run]) -> Plot | None:
    """Each further run's training loss against the first run's, both smoothed, in percent."""
    steps, values = runs[0].series("loss")
    base = dict(zip(steps.tolist(), _smooth(values), strict=True))
    curves = []
    for index, run in enumerate(runs[1:], start=1):
        other_steps, other = run.series("loss")
        smooth = dict(zip(other_steps.tolist(), _smooth(other), strict=True))
        shared = [step for step in smooth if base.get(step)]
        percent = [100 * (smooth[step] / base[step] - 1) for step in shared]
        if shared:
            curves.append(plots.Curve(index, np.array(shared), np.array(percent)))
    if not curves:
        return None
    note = f"Training loss of each run in percent of {runs[0].label}, both smoothed over 5 %; below zero is better."
    svg = plots.lines("difference", curves, smooth=False, zero_line=True, write=lambda v: f"{v:+.2f} %")
    return Plot(f"Difference to {runs[0].label}", note, svg)


def _smooth(values: np.ndarray) -> list[float]:
    return plots.rolling_mean(values, max(5, len(values) // 20)).tolist()


def _curves(runs: Sequence[Run], key: str, kind: str = "train") -> list[plots.Curve]:
    read = [(index, *run.series(key, kind)) for index, run in enumerate(runs)]
    return [plots.Curve(index, steps, values) for index, steps, values in read if np.isfinite(values).any()]


def _heat_maps(index: int, run: Run, several: bool) -> list[Plot]:
    """Underflow and SQNR by layer at the run's last health measurement."""
    measured = run.health()
    if measured is None:
        return []
    step, layers = measured
    whose = f" · {run.label}" if several else ""
    found = []
    for key, title, edges, note in (
        ("underflow", "Underflow by layer", UNDERFLOW_EDGES, "Share of non-zero values that FP8 turns into zero"),
        ("sqnr_db", "Signal to quantisation noise by layer", SQNR_EDGES, "Decibels; higher is better"),
    ):
        panels: dict[str, dict[tuple[str, str], float]] = {}
        for layer, values in layers.items():
            for operand, name in OPERANDS.items():
                if (value := values.get(f"{operand}_{key}")) is not None:
                    panels.setdefault(name, {})[_place(layer)] = value
        if panels:
            svg = plots.heat_map(f"{key}-{index}", panels, edges)
            legend = _levels(edges, key)
            found.append(Plot(title + whose, f"{note}. Measured at step {step:,}.", svg, legend=legend))
    return found


def _place(layer: str) -> tuple[str, str]:
    """model.layers.11.self_attn.q_proj -> ("11", "q"); any other name is a row of its own."""
    parts = layer.split(".")
    number = next((part for part in parts if part.isdigit()), None)
    if number is None:
        return layer, ""
    return number, parts[-1].removesuffix("_proj").replace("_", " ")


def _levels(edges: Sequence[float], key: str) -> list[str]:
    write = _percent if key == "underflow" else (lambda v: f"{v:g}")
    outer = ("<", "≥") if edges[-1] > edges[0] else ("≥", "<")
    between = [f"{write(a)}–{write(b)}" for a, b in pairwise(edges)]
    unit = "" if key == "underflow" else " dB"
    return [f"{outer[0]} {write(edges[0])}{unit}", *between, f"{outer[1]} {write(edges[-1])}{unit}"]


def _completions(run: Run) -> list[dict[str, Any]]:
    """A few completions of a run, the first and the last ones that were written down."""
    samples = [sample for sample in run.samples if sample.get("kind") == "train"]
    return samples if len(samples) <= 2 * COMPLETIONS else samples[:COMPLETIONS] + samples[-COMPLETIONS:]


def _environment(run: Run) -> list[tuple[str, str]]:
    """(name, text) rows of run.json, the folder last; the command is shown apart."""
    rows = []
    for key, value in run.environment.items():
        if isinstance(value, dict):
            rows.append((key, ", ".join(f"{name} {item}" for name, item in value.items())))
        elif key != "command":
            rows.append((key, str(value)))
    return [*rows, ("folder", str(run.path))]


def _command(run: Run) -> str:
    """The command line of run.json, which holds it as text or as a list of words."""
    command = run.environment.get("command", "")
    return shlex.join(map(str, command)) if isinstance(command, list) else str(command)
