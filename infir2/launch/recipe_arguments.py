"""The command line of every stage that is told what to do by a recipe."""

import argparse
import textwrap
from pathlib import Path

from infir2.config import TrainingConfig, describe


def add_recipe_arguments(parser: argparse.ArgumentParser, kind: type[TrainingConfig], example: str) -> None:
    """RECIPE, --dry-run, and the recipe's keys below the help. ``example`` is the name of a file in recipes/."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help=f"TOML file, such as recipes/{example}")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe, parameters and memory; stop")
    parser.epilog = "recipe keys (override with --section.key value):\n" + "\n".join(
        f"  --{key}  {values}\n{textwrap.indent(text, '      ')}" for key, values, text in describe(kind)
    )
