"""A chain of stages from one file, each fed by those before it: `infir2 pipeline PIPELINE [--vars.NAME VALUE ...]`.

The file lists infir2 commands in their order. In a command, {out} is the stage's own place in the chain's folder,
{NAME} the place of an earlier stage, or a variable of the table [vars]:

    run = "runs/qwen-1.5b"

    [vars]
    base = "models/Qwen2.5-1.5B"

    [[stage]]
    name = "corpus"
    command = "prepare data/text --tokenizer {base} --out {out}"

    [[stage]]
    name = "cpt"
    command = '''cpt recipes/cpt_1.5b.toml --run {out} --model.path {base} --data.sources '{ "{corpus}" = 1.0 }' '''

A finished stage is skipped for as long as its command, its recipe, its files and the stages it reads stay what they
were. Interrupt or kill the chain whenever you like: the same command goes on, in the middle of a stage where that can.
A stage whose inputs have changed is made anew; what it had made before is kept under old/. At the end RUN/report.html
tells the whole chain.
"""

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from infir2.errors import UserError
from infir2.launch.held_folder import held
from infir2.launch.pipeline_plan import Plan, Step, read_plan
from infir2.launch.pipeline_run import run_step, stop_code
from infir2.report import write_chain_report
from infir2.train.live import duration

ACCEPTS_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pipeline", type=Path, metavar="PIPELINE", help="TOML file, such as recipes/pipeline_tiny.toml")
    parser.add_argument("--list", action="store_true", help="show the stages, which are finished, and their commands")
    parser.add_argument("--until", metavar="NAME", help="stop after this stage")
    parser.epilog = "--run FOLDER and --vars.NAME VALUE replace what the file says."


def run(args: argparse.Namespace) -> int:
    plan = read_plan(args.pipeline, args.overrides)
    console = Console()
    if args.list:
        show(plan, console)
        return 0
    return run_plan(plan, console, args.until)


def show(plan: Plan, console: Console) -> None:
    for number, step in enumerate(plan.steps, 1):
        mark = "[green]done[/green]" if plan.is_finished(step) else "to do"
        console.print(f"{number:3} {step.name:<14} {mark:<5}  [dim]{escape(step.command_line)}[/dim]", soft_wrap=True)


def run_plan(plan: Plan, console: Console, until: str | None = None) -> int:
    """Run what is not finished, then write the report; returns the exit code.

    Raises UserError for an unknown ``until`` and for a folder in which another chain runs or that cannot be written,
    and StageFailed.
    """
    names = [step.name for step in plan.steps]
    if until is not None and until not in names:
        raise UserError(f"--until {until}: no stage of that name; the stages are {', '.join(names)}")
    last = len(names) if until is None else names.index(until) + 1
    began = time.monotonic()
    # A lock of its own, beside that of a training stage whose run folder is the chain's.
    with held(plan.run, "another pipeline is running in this folder", "give another folder", ".pipeline.lock"):
        for number, step in enumerate(plan.steps[:last], 1):
            done = plan.is_finished(step)
            _headline(console, number, len(names), step, "is finished" if done else "")
            if not done and (code := run_step(plan, step)):
                raise _stopped(step, code)
        report = plan.run / "report.html"
        write_chain_report(plan.run, report)
    took = duration(time.monotonic() - began)
    console.print(f"\nfinished in {took}; open [bold]{report}[/bold]", highlight=False, soft_wrap=True)
    return 0


def _stopped(step: Step, code: int) -> "StageFailed":
    if stopped := stop_code(code):
        return StageFailed(f"interrupted in stage {step.name!r}; the same command goes on from there", stopped)
    return StageFailed(f"stage {step.name!r} ended with exit code {code}; mend it, and run the same command", code)


def _headline(console: Console, number: int, total: int, step: Step, note: str) -> None:
    """A bar over the whole chain, and the stage that is next."""
    width = 24
    filled = round(width * (number - 1) / total)
    bar = f"[cyan]{'━' * filled}[/cyan][dim]{'━' * (width - filled)}[/dim]"
    console.print(f"{'' if note else chr(10)}{bar} {number}/{total} [bold]{step.name}[/bold] {note}", highlight=False)


class StageFailed(UserError):
    """The failure of a stage, which has told its reason itself, with its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code
