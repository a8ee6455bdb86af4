"""The report of a whole chain of stages (`infir2 pipeline`): what each made, evaluations, answers, and all training."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from infir2.errors import UserError
from infir2.report.html import Plot, group_of, write_page
from infir2.report.runs import Run, read_run
from infir2.report.stage_table import STAGE_TABLE, command_of, read_stage_table
from infir2.train.live import duration

KINDS = {
    "prepare": "Text to token shards",
    "examples": "Questions with worked solutions",
    "cpt": "Pre-training",
    "sft": "Supervised fine-tuning",
    "rl": "Reinforcement learning",
    "convert": "Model conversion",
    "eval": "Evaluation",
    "report": "Report",
}
TRAINING = ("cpt", "sft", "rl")
ANSWERS = 4  # questions of a task for which every model's response is shown


def is_chain(folder: Path) -> bool:
    return (folder / STAGE_TABLE).is_file()


def write_chain_report(folder: Path, out: Path) -> None:
    """Write one self-contained HTML file about the stages that a pipeline has finished so far.

    Raises UserError, naming the file, where something it needs is broken.
    """
    table = read_stage_table(folder)
    evaluations = [_read_evaluation(path) for path in sorted(folder.glob("*/eval.json"))]
    runs = _runs(folder, table)
    groups = []
    for kind in TRAINING:
        if members := [run for word, run in runs if word == kind]:
            members.sort(key=lambda run: run.precision != "BF16")  # what the others are compared with comes first
            groups.append((KINDS[kind], _with_own_ids(group_of(members), kind)))
    content = {
        "stages": [_stage(folder, name, facts, {run.label: run for _, run in runs}) for name, facts in table.items()],
        "scores": [table for evaluation in evaluations for table in _scores(evaluation)],
        "paired": [line for evaluation in evaluations for line in _paired(evaluation)],
        "answers": [answer for path in sorted(folder.glob("*/eval.json")) for answer in _answers(path.parent)],
        "groups": groups,
    }
    write_page(out, "chain_report.html", folder.resolve().name, "From text to an evaluated model", content)


def _runs(folder: Path, table: dict[str, dict[str, Any]]) -> list[tuple[str, Run]]:
    """(command, run) of every training stage that has made a step."""
    found = []
    for name, facts in table.items():
        word = _word(facts)
        if word in TRAINING and (folder / name / "metrics.jsonl").is_file():
            found.append((word, read_run(folder / name, name)))
    return found


def _word(facts: dict[str, Any]) -> str:
    return "".join(command_of(facts)[:1])


def _stage(folder: Path, name: str, facts: dict[str, Any], runs: dict[str, Run]) -> dict[str, Any]:
    word, seconds = _word(facts), facts.get("seconds")
    return {
        "name": name,
        "kind": KINDS.get(word, word),
        "command": facts.get("command", ""),
        "seconds": seconds,
        "time": duration(seconds) if seconds else "not finished",
        "result": _run_result(runs[name]) if name in runs else _file_result(_place(folder, name, facts)),
    }


def _place(folder: Path, name: str, facts: dict[str, Any]) -> Path:
    """What a stage writes: its own place, or the file that examples are asked for, perhaps in another's folder."""
    word, *rest = command_of(facts) or [""]
    parts = Path(rest[0]).parts if word == "examples" and rest else ()
    if folder.name not in parts:
        return folder / name
    return folder.joinpath(*parts[len(parts) - parts[::-1].index(folder.name) :])


def _run_result(run: Run) -> str:
    """The number that a training stage is judged by, from its first measurement to its last."""
    for key, text in (("eval_reward", "held-out reward"), ("eval_loss", "held-out loss")):
        _, values = run.series(key, "eval")
        if len(values):
            return f"{text} {values[0]:.3f} → {values[-1]:.3f}" if len(values) > 1 else f"{text} {values[-1]:.3f}"
    return ""


def _file_result(place: Path) -> str:
    if (place / "eval.json").is_file():
        *_, last = _read_evaluation(place / "eval.json")["models"]
        scores = (f"{_short(task)} {score['average']:.1%}" for task, score in last["tasks"].items())
        return f"{', '.join(scores)} ({last['name']})"
    files = [path for path in (place, *place.parent.glob(f"{place.name}.*"), *place.rglob("*")) if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    if not files:
        return ""
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


def _scores(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """One table a task, one row a model."""
    tables: dict[str, dict[str, Any]] = {}
    for model in evaluation["models"]:
        for task, score in model["tasks"].items():
            k = str(score["samples"])
            table = tables.setdefault(task, {"task": _short(task), "samples": k, "rows": []})
            table["rows"].append(
                (
                    model["name"],
                    score["problems"],
                    f"{score['average']:.1%}",
                    "–" if score["low"] is None else f"{score['low']:.1%} – {score['high']:.1%}",
                    f"{score['pass_at'][k]:.1%}",
                    f"{score['mean_tokens']:.0f}",
                    f"{score['truncated']:.1%}",
                )
            )
    return list(tables.values())


def _short(task: str) -> str:
    """reasoning_gym:runs/demo/exam.jsonl -> exam; other tasks have short names."""
    return Path(task.partition(":")[2]).stem if "." in task else task


def _paired(evaluation: dict[str, Any]) -> list[str]:
    pair = evaluation.get("paired")
    if not pair:
        return []
    return [
        f"{_short(task)}: {pair['second']} minus {pair['first']} {100 * found['difference']:+.1f} points, "
        f"95 % interval {_points(found['low'], found['high'])}, p = {found['p_value']:.3g}"
        for task, found in pair["tasks"].items()
    ]


def _points(low: float | None, high: float | None) -> str:
    """A dash for a single problem, which has no interval."""
    return "–" if low is None or high is None else f"{100 * low:+.1f} to {100 * high:+.1f}"


def _answers(folder: Path) -> list[dict[str, Any]]:
    """For some problems of each task the first response of every model: first those that only the last ones solve."""
    names = [model["name"] for model in _read_evaluation(folder / "eval.json")["models"]]
    shown = []
    for path in sorted((folder / names[0]).glob("*.jsonl")) if len(names) > 1 else []:
        by_model = {name: _first_samples(folder / name / path.name) for name in names}
        shared = [key for key in by_model[names[0]] if all(key in samples for samples in by_model.values())]
        shared.sort(key=lambda key: by_model[names[0]][key]["score"] - by_model[names[-1]][key]["score"])
        for key in shared[:ANSWERS]:
            samples = {name: by_model[name][key] for name in names}
            question = samples[names[0]].get("question", "")
            shown.append(
                {
                    "title": " ".join((question or key).split())[:90],
                    "question": question,
                    "responses": [(name, one["response"], one["score"]) for name, one in samples.items()],
                }
            )
    return shown


def _first_samples(path: Path) -> dict[str, dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return {row["problem"]: row for row in reversed(rows)}


def _with_own_ids(group: dict[str, Any], name: str) -> dict[str, Any]:
    """The drawings of several groups share a page: give every id of this one's a prefix."""

    def renamed(plots: Sequence[Plot]) -> list[Plot]:
        return [
            replace(
                plot,
                svg={kind: re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg) for kind, svg in plot.svg.items()},
            )
            for plot in plots
        ]

    return {**group, "plots": renamed(group["plots"]), "heat_maps": renamed(group["heat_maps"])}


def _read_evaluation(path: Path) -> dict[str, Any]:
    """eval.json as `infir2 eval` writes it."""
    found = _read_json(path)
    models = found.get("models") if isinstance(found, dict) else None
    if not models or not all(isinstance(model, dict) and {"name", "tasks"} <= model.keys() for model in models):
        raise UserError(f"{path}: not written by `infir2 eval`; move it away")
    return found


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
