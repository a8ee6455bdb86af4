"""The whole job on this machine, in minutes and with nothing downloaded: `infir2 demo`.

The installed Python standard library becomes a corpus; a tiny model is pre-trained on it in BF16 and in FP8, decayed,
fine-tuned on worked sums in two stages, taught further by reinforcement learning in two stages, exported in FP8 and
evaluated after every stage; a report tells it all. Each stage is an ordinary command: the chain is
recipes/pipeline_tiny.toml. Interrupt it whenever you like: the same command goes on where it stopped.
"""

import argparse
import sysconfig
from pathlib import Path

from rich.console import Console

import infir2
from infir2.config import load
from infir2.stages.pipeline import run_plan, show
from infir2.stages.pipeline_plan import PipelineConfig, make_plan

RECIPES = Path(infir2.__file__).parent / "recipes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="runs/demo", help="folder for everything (runs/demo)")
    parser.add_argument("--list", action="store_true", help="show the stages, which are finished, and their commands")
    parser.add_argument("--until", metavar="NAME", help="stop after this stage")


def run(args: argparse.Namespace) -> int:
    chain = RECIPES / "pipeline_tiny.toml"
    text = sysconfig.get_path("stdlib")
    words = ["--run", args.out, "--vars.recipes", str(RECIPES), "--vars.text", text]
    plan = make_plan(load(PipelineConfig, chain, words), str(chain))
    console = Console()
    if args.list:
        show(plan, console)
        return 0
    return run_plan(plan, console, args.until)
