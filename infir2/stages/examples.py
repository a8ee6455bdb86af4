"""Data for fine-tuning that is made on this machine: `infir2 examples OUT.jsonl --stage 1`.

Writes questions with verified step-by-step solutions, one conversation a line, for `infir2 sft`; with --form prompts
the questions alone, each with what its answers are scored against, for `infir2 rl`; with --form text plain text for
`infir2 prepare`, so that a tokenizer learns the words of the questions. The same options give the same bytes. Held-out
questions (--split held_out) never occur in a train split, whatever the seed.
"""

import argparse
import json
from collections import Counter
from contextlib import suppress
from pathlib import Path

from infir2.durable import check_output, write_output
from infir2.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="file to write (.jsonl); an existing one is replaced")
    add("--stage", type=int, choices=(1, 2), default=1, help="1 = easy questions, 2 = harder ones (default: 1)")
    add("--count", type=int, default=5000, help="examples to write")
    add("--seed", type=int, default=1, help="another seed, other questions")
    add("--split", choices=("train", "held_out"), default="train", help="which questions")
    add("--form", choices=("messages", "prompts", "text"), default="messages", help="what a line holds")
    add("--families", nargs="+", default=(), metavar="NAME", help="kinds of questions (default: all)")


def run(args: argparse.Namespace) -> int:
    from infir2.data.worked_solutions import worked_examples

    if args.count < 1 or args.seed < 0:
        raise DataError("--count must be at least 1, and --seed must not be negative")
    with suppress(OSError):  # the check says what is wrong
        args.out.parent.mkdir(parents=True, exist_ok=True)
    check_output(args.out, "OUT")
    counts: Counter[str] = Counter()
    lines = []
    for example in worked_examples(args.stage, args.count, args.seed, args.split, args.families):
        row = {"messages": example.row, "prompts": example.prompt_row, "text": example.text_row}[args.form]
        lines.append(json.dumps(row(), ensure_ascii=False) + "\n")
        counts[example.family] += 1
    write_output(args.out, "".join(lines))
    print(f"{args.out}: {args.count} examples ({', '.join(f'{name} {n}' for name, n in counts.items())})")
    return 0
