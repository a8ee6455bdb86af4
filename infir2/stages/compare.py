"""Is FP8 as good as BF16? `infir2 compare RECIPE` trains pairs that differ in precision alone, and says.

For every seed the recipe is trained once in each precision, with the same first weights and the same batches. The
answer is the mean relative difference of the final held-out losses with a 95 % confidence interval over the seeds.
Finished runs are not repeated; an interrupted one is resumed. Other keys of the recipe can differ too:
`--precisions hybrid hybrid+optim.moments=bfloat16`. Everything is written into RUN-compare, where RUN is the recipe's
run folder, or into the folder that --run names.
"""

import argparse
import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from infir2.config import CptConfig, Fp8Section, changed, load
from infir2.durable import check_output, write_output
from infir2.errors import ConfigError
from infir2.evaluate.student import student_interval

ACCEPTS_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a CPT recipe")
    parser.add_argument(
        "--precisions", nargs="+", default=["bf16", "blockwise", "hybrid"], type=_precision, metavar="NAME[+KEY=VALUE]",
        help="FP8 recipes to compare, each perhaps with other keys of the recipe changed; the first is the baseline "
        "(default: bf16 blockwise hybrid)",
    )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=_seed, default=[1, 2, 3], metavar="N", help="seeds (default: 1 2 3)")
    parser.add_argument("--json", type=Path, help="also write the result here")


def run(args: argparse.Namespace) -> int:
    from infir2.launch.environment import environment
    from infir2.launch.held_folder import writing
    from infir2.launch.run_folder import exit_code
    from infir2.parallel.runtime import world
    from infir2.report import write_report
    from infir2.stages.cpt import train_cpt

    for option, values in (("--precisions", args.precisions), ("--seeds", args.seeds)):
        if len(set(values)) < len(values):
            raise ConfigError(f"{option}: {' '.join(map(str, values))}: one is named twice")
    if len(args.precisions) < 2:
        raise ConfigError(f"--precisions: {args.precisions[0]}: nothing to compare it with; name the baseline first")
    config = own_folder(load(CptConfig, args.recipe, args.overrides), args.overrides)
    if not config.train.eval_every:
        raise ConfigError(f"{args.recipe}: train.eval_every is 0, but the held-out loss is what is compared")
    for name in args.precisions:
        variant(config, name, args.seeds[0])  # a mistake in any of them is told before the first run
    folder = Path(config.run)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if args.json:
        check_output(args.json, "--json")
    with world(config.parallel.replicate) as here:
        for seed in args.seeds:
            for name in args.precisions:
                one = variant(config, name, seed)
                if stopped := train_cpt(one, here):
                    return exit_code(stopped, one, here)
        if not here.is_main:
            return 0
    recipe = config.model_dump(mode="json", exclude={"run"})
    result = {**environment(), "recipe": recipe, **summarise(folder, args.precisions, args.seeds)}
    for path in filter(None, (folder / "compare.json", args.json)):
        write_output(path, to_json(result))
    first = [Path(variant(config, name, args.seeds[0]).run) for name in args.precisions]
    write_report(first, folder / "report.html", labels=args.precisions)
    for name in args.precisions[1:]:
        row = result["difference"][name]
        if row["mean"] is None:
            print(f"{name} against {args.precisions[0]}: no seed of which both runs came to the end")
            continue
        interval = f"{row['low95']:+.3%} to {row['high95']:+.3%}" if row["low95"] is not None else "needs two seeds"
        print(
            f"{name} against {args.precisions[0]}: held-out loss {row['mean']:+.3%}, 95 % interval {interval}, "
            f"{len(row['pairs'])} seed(s)"
        )
    print(f"written to {folder}/compare.json and {folder}/report.html")
    return 0


def to_json(result: Any) -> str:
    """JSON text, with null for numbers that JSON has no word for: the loss of a step that was skipped."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(result), indent=1, allow_nan=False) + "\n"


def own_folder(config: CptConfig, overrides: Sequence[str]) -> CptConfig:
    """The recipe with a run folder for the comparison alone: the one that the command line names, else RUN-compare.

    Raises ConfigError where there is a training run in it.
    """
    named = any(word.partition("=")[0] == "--run" for word in overrides)
    folder = Path(config.run if named else f"{config.run.rstrip('/')}-compare")
    if (folder / "metrics.jsonl").exists():
        raise ConfigError(f"--run {folder}: holds a training run; give a comparison a folder of its own")
    return changed(config, [f"--run={folder}"])


def summarise(folder: Path, precisions: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Final losses, paired differences to the first precision, and loss curves of the runs in ``folder``.

    A run that did not reach the last step of the longest one is left out, and with it its pair.
    """
    curves = {name: {seed: _curve(_run_folder(folder, name, seed)) for seed in seeds} for name in precisions}
    last = max((step for runs in curves.values() for curve in runs.values() for step in curve["step"]), default=0)
    finals: dict[str, dict[int, float]] = {
        name: {seed: c["held_out"][-1][1] for seed, c in runs.items() if c["held_out"] and c["held_out"][-1][0] == last}
        for name, runs in curves.items()
    }
    baseline = finals[precisions[0]]
    differences = {}
    for name in precisions[1:]:
        paired = [seed for seed in seeds if seed in baseline and seed in finals[name]]
        pairs = paired_difference([baseline[s] for s in paired], [finals[name][s] for s in paired])
        differences[name] = {"seeds": paired, **asdict(pairs)}
    return {"baseline": precisions[0], "held_out_loss": finals, "difference": differences, "curves": curves}


def _curve(run: Path) -> dict[str, list]:
    from infir2.train.metrics import read_metrics

    lines = read_metrics(run / "metrics.jsonl")
    train = [line for line in lines if line["kind"] == "train"]
    return {
        "step": [line["step"] for line in train],
        "loss": [round(line["loss"], 5) for line in train],
        "held_out": [[line["step"], line["eval_loss"]] for line in lines if line["kind"] == "eval"],
    }


def variant(config: CptConfig, precision: str, seed: int) -> CptConfig:
    """The recipe in one precision, as the command line names it, with one seed, in a folder of its own."""
    name, *changes = _CHANGE.split(precision)
    head = config.fp8.head and name != "bf16"  # which has no FP8 head
    table = {"fp8.recipe": name, "fp8.head": json.dumps(head), "train.seed": seed}
    words = [f"--{key}={value}" for key, value in table.items()]
    words += [f"--{change}" for change in changes]
    return changed(config, [*words, f"--run={_run_folder(Path(config.run), precision, seed)}"])


# Between a precision's name and the keys that are changed with it; a number such as 1e+5 holds a plus as well.
_CHANGE = re.compile(r"\+(?=[a-z][a-z0-9_]*\.)")


def _precision(text: str) -> str:
    name, *changes = _CHANGE.split(text)
    names = get_args(Fp8Section.model_fields["recipe"].annotation)
    if name not in names:
        raise argparse.ArgumentTypeError(f"invalid choice: {name!r} (choose from {', '.join(names)})")
    for change in changes:
        if change.partition("=")[0] == "train.seed" or "=" not in change:
            raise argparse.ArgumentTypeError(
                f"{text!r}: expected +section.key=value after {name}; seeds have an option"
            )
    return text


def _run_folder(folder: Path, precision: str, seed: int) -> Path:
    return folder / f"{precision.replace('/', '_')}-seed{seed}"


@dataclass(frozen=True)
class Difference:
    """Relative difference of paired losses, as a fraction of the baseline's."""

    mean: float | None
    """None where there is no pair."""
    low95: float | None
    high95: float | None
    """The 95 % confidence interval; None where there are less than two pairs."""
    pairs: list[float]


def paired_difference(baseline: Sequence[float], other: Sequence[float]) -> Difference:
    """Mean of other / baseline - 1 over the pairs, with its 95 % confidence interval (Student's t)."""
    pairs = [b / a - 1.0 for a, b in zip(baseline, other, strict=True)]
    low, high = student_interval(pairs)
    return Difference(statistics.fmean(pairs) if pairs else None, low, high, pairs)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)
