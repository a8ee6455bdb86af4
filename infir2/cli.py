"""The console script `infir2`: finds the subcommand, hands over to its stage, words the user's mistakes.

Only the chosen stage is imported: `infir2 --help` answers without torch. A stage is a module of infir2.stages with
``add_arguments(parser)`` and ``run(args) -> int``; with ``ACCEPTS_OVERRIDES = True`` it also gets ``args.overrides``,
the words of every ``--section.key value`` that it does not know itself, in their order.
"""

import argparse
import contextlib
import difflib
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from infir2 import __version__
from infir2.errors import UserError, did_you_mean

COMMANDS = {
    "doctor": "say what this machine can do, and which FP8 path will run",
    "prepare": "turn text into token shards",
    "examples": "write worked examples: generated questions with verified step-by-step solutions",
    "cpt": "continual pre-training from a recipe file",
    "sft": "supervised fine-tuning on conversations, from a recipe file",
    "rl": "reinforcement learning on prompts with checkable answers, from a recipe file",
    "compare": "train FP8 and BF16 pairs over several seeds and give the difference with its interval",
    "bench": "measure FP8 against BF16 side by side",
    "report": "write one HTML page about one or several runs",
    "demo": "the whole job on this machine, in minutes",
    "pipeline": "run a chain of these commands from one file, each fed by those before it",
    "serve": "serve a model over HTTP as OpenAI's API does",
    "eval": "score a model on benchmarks and local tasks, or compare two problem by problem",
    "convert": "turn checkpoints, Hugging Face folders and FP8 folders into each other",
}

HELP = f"""usage: infir2 COMMAND ...

Train reasoning language models in FP8, from raw text to an evaluated model.

commands:
{chr(10).join(f"  {name:<9} {line}" for name, line in COMMANDS.items())}

options:
  -h, --help  show this text; `infir2 COMMAND --help` tells more about a command
  --version   show the version"""


class UsageError(UserError):
    """A command line that cannot be understood."""


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line, like every other mistake of the user."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Faults of the program itself keep their traceback."""
    try:
        code = _dispatch(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()  # a closed pipe shows here, where it can still be answered
        return code
    except UserError as error:
        _report(error)
        return error.exit_code
    except KeyboardInterrupt:
        if _first_rank():
            print("infir2: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has gone (`infir2 ... | head`). Point stdout elsewhere, or Python complains again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except SystemExit as stop:  # argparse's --help
        return stop.code if isinstance(stop.code, int) else 0


def split_overrides(words: Sequence[str], parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """(words for the parser, override words): an override is an option that the parser does not know, and its value.

    argparse's own parse_known_args would take the value of ``--optim.lr 5e-5`` for the recipe file that follows it.
    """
    known = [option for action in parser._actions for option in action.option_strings]
    ours, overrides, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        name, equals, _ = word.partition("=")
        if word == "--" or not word.startswith("--") or name in known:
            ours.append(word)
        elif meant := _mistyped(name, known):
            raise UsageError(f"{name}: no such option. Did you mean {meant!r}? (see `{parser.prog} --help`)")
        elif equals:
            overrides.append(word)
        elif not rest or rest[0].startswith("--"):
            raise UsageError(f"{word}: needs a value.{did_you_mean(word, known)} (see `{parser.prog} --help`)")
        else:
            overrides.extend([word, rest.pop(0)])
    return ours, overrides


def _mistyped(name: str, known: Sequence[str]) -> str | None:
    """The option that a word without a section almost is: as an override it would swallow the word behind it.

    Almost, because recipes have keys without a section, and --run is not far from --dry-run.
    """
    if "." in name:
        return None
    close = difflib.get_close_matches(name.replace("_", "-"), known, 1, cutoff=0.8)
    return next((option for option in known if option.startswith(name)), close[0] if close else None)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written; an option tells its default, unless its text says it in words of its own."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, value = action.help or "", action.default
        told = isinstance(value, str | int | float) and value is not False and value != argparse.SUPPRESS
        return f"{text} (default: %(default)s)" if told and action.option_strings and "default" not in text else text


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if words else 2
    name, *rest = words
    if name == "--version":
        print(f"infir2 {__version__}")
        return 0
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS) or f" Commands: {', '.join(COMMANDS)}."
        raise UsageError(f"{name}: unknown command.{hint}")
    stage = importlib.import_module(f"infir2.stages.{name}")
    parser = Parser(prog=f"infir2 {name}", description=stage.__doc__, allow_abbrev=False)
    parser.formatter_class = _Help
    stage.add_arguments(parser)
    overrides: list[str] = []
    if getattr(stage, "ACCEPTS_OVERRIDES", False):
        rest, overrides = split_overrides(rest, parser)
    args = parser.parse_args(rest)
    args.overrides = overrides
    return stage.run(args)


def _first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _report(error: UserError) -> None:
    """One line a mistake on stderr, from rank 0 only. Under torchrun every rank also leaves its message for torchrun's
    summary, so that a mistake that only another rank meets (a file missing on one machine) is still told."""
    if _first_rank():
        for line in str(error).split("\n"):
            print(f"infir2: error: {line}", file=sys.stderr)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"message": str(error), "extraInfo": {"py_callstack": str(error), "timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:  # the exit code tells the rest
            json.dump({"message": details}, file)
