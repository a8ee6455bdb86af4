"""The whole job on this machine, in minutes and with nothing downloaded: `infir2 demo`.

The source of installed Python packages becomes a corpus; a model is pre-trained on it in BF16 and in FP8, decayed,
fine-tuned on worked arithmetic in two stages, taught further by reinforcement learning in two stages, exported in FP8
and evaluated after every stage; a report tells it all. Each stage is an ordinary command: the chain is
recipes/pipeline_tiny.toml, a model of half a million parameters, or recipes/pipeline_small.toml, one of 130 million,
where a GPU multiplies FP8 itself and has the memory. Interrupt it whenever you like: the same command goes on where it
stopped.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from rich.console import Console

import infir2
from infir2.launch.pipeline_plan import read_plan
from infir2.stages.pipeline import run_plan, show

RECIPES = Path(infir2.__file__).parent / "recipes"
SIZES = ("tiny", "small")
SMALL_GIB = 40
"""Memory that a GPU should have for the small chain, with room to spare."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="runs/demo", help="folder for everything")
    parser.add_argument(
        "--size", choices=SIZES,
        help="which chain: tiny, made for two CPU cores, or small, made for one GPU (default: small on a Hopper GPU of "
        f"{SMALL_GIB} GiB or more, because that multiplies FP8 itself; else tiny)"
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="show the stages, which are finished, and their commands")
    parser.add_argument("--until", metavar="NAME", help="stop after this stage")


def run(args: argparse.Namespace) -> int:
    size = args.size or default_size(this_machine())
    chain = RECIPES / f"pipeline_{size}.toml"
    words = ["--run", args.out, "--vars.recipes", str(RECIPES), "--vars.text", str(corpus(size))]
    plan = read_plan(chain, words)
    console = Console()
    if args.list:
        show(plan, console)
        return 0
    other = SIZES[1 - SIZES.index(size)]
    console.print(f"the {size} chain, {chain.name}; --size {other} runs the other", highlight=False)
    return run_plan(plan, console, args.until)


def default_size(findings: dict[str, Any]) -> str:
    """The chain for a machine of which `infir2 doctor` says so."""
    native = findings["fp8"]["backend"] != "reference"
    return "small" if native and findings["gpus"][0]["memory_gib"] >= SMALL_GIB else "tiny"


def this_machine() -> dict[str, Any]:
    """What `infir2 doctor` finds here, asked in a process of its own: this one is to hold no memory of the GPU."""
    command = [sys.executable, "-m", "infir2", "doctor", "--json"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def corpus(size: str) -> Path:
    """A folder of text that is on every machine that runs this: the standard library, or the larger source of torch."""
    found = importlib.util.find_spec("torch") if size == "small" else None
    return Path(found.origin).parent if found and found.origin else Path(sysconfig.get_path("stdlib"))
