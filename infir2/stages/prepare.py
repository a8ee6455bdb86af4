"""`infir2 prepare`: text files to a folder of token shards, with a tokenizer brought along or trained on the text.

The folder is built under a temporary name beside its place and renamed at the end: it is whole or not there.
"""

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from infir2.data.dataset import SPLITS, Dataset
from infir2.data.prepare import Options, prepare
from infir2.errors import DataError
from infir2.launch.progress import by_pieces, bytes_bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``infir2 prepare``."""
    default = Options()
    add = parser.add_argument
    add("inputs", nargs="*", help="files (.txt .jsonl .jsonl.gz .jsonl.zst .parquet) or folders of them")
    add("--out", required=True, help="folder to make; a data set prepared there before is replaced")
    add("--tokenizer", help="Hugging Face tokenizer folder or tokenizer.json (default: train a byte-level BPE)")
    add("--vocab-size", type=int, default=default.vocab_size, help="size of a trained tokenizer")
    sample = default.tokenizer_sample_bytes
    add("--tokenizer-sample-bytes", type=int, default=sample, help="bytes of text a tokenizer is trained on")
    add("--text-key", default=default.text_key, help="key of .jsonl, column of .parquet")
    add("--extensions", nargs="+", default=(), metavar="EXT", help="read these like .txt too, such as .py .md")
    add(
        "--exclude",
        nargs="+",
        default=(),
        metavar="NAME",
        help="skip files and folders of these names, such as test *.min.*",
    )
    add(
        "--validation-fraction",
        type=float,
        default=default.validation_fraction,
        help="share of the documents that is held out",
    )
    add("--shard-tokens", type=int, default=default.shard_tokens, help="about so many tokens in a shard")
    add("--seed", type=int, default=default.seed, help="decides the held-out documents and --shuffle")
    add("--max-bad-rows", default=default.max_bad_rows, help="stop above this many bad rows: 20, or 1%%")
    add("--max-doc-bytes", type=int, default=default.max_doc_bytes, help="documents of more bytes are bad rows")
    add("--max-bytes", type=int, help="stop at the document that reaches so many bytes of text (default: read all)")
    add("--workers", type=int, default=0, help="tokeniser threads (default: all cores); the result is the same")
    add("--shuffle", action="store_true", help="write documents in random order (the text must fit in memory)")
    add("--verify", action="store_true", help="make nothing: check every hash of the data set at --out")


def run(args: argparse.Namespace) -> int:
    """``infir2 prepare``: make a data set, or with --verify check one, and say what it holds."""
    console = Console()
    if args.verify:
        if args.inputs:
            raise DataError("--verify checks the data set at --out and takes no inputs")
        total = sum(file.stat().st_size for file in Path(args.out).glob("*-*.*"))
        with bytes_bar(console, "verifying", after=0) as report:
            dataset = Dataset(args.out, verify=True, progress=by_pieces(report, total))
        console.print("every file matches its hash", highlight=False)
    else:
        if not args.inputs:
            raise DataError(f"name at least one file or folder of text{_taken(args)}")
        fields = {name: getattr(args, name) for name in Options.__dataclass_fields__}
        fields |= {"extensions": tuple(args.extensions), "exclude": tuple(args.exclude)}
        with _sigterm_unwinds(), bytes_bar(console, "preparing", after=0) as report:
            dataset = prepare(args.inputs, args.out, progress=report, **fields)
    print_summary(dataset, console)
    return 0


def _taken(args: argparse.Namespace) -> str:
    """Which option took the inputs for its own values, where one did: it takes all words up to the next option."""
    for option, values in (("--extensions", args.extensions), ("--exclude", args.exclude)):
        if places := [value for value in values if Path(value).exists()]:
            names = " ".join(places)
            return (
                f": {option} took {names} for one of its values. Put {names} first: infir2 prepare {names} {option} ..."
            )
    return ""


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """SIGTERM leaves by way of an exception, which removes the unfinished folder."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def print_summary(dataset: Dataset, console: Console) -> None:
    """What a data set holds, and which rows were left out."""
    record = dataset.record
    table = Table("split", "documents", "tokens", "shards", title=f"{dataset.folder} ({record.vocab_size} token ids)")
    for split in SPLITS:
        numbers = (dataset.num_documents(split), dataset.num_tokens(split), len(record.splits.get(split, [])))
        table.add_row(split, *(f"{number:,}" for number in numbers))
    console.print(table)
    for reason, count in record.bad_rows.counts.items():
        places = ", ".join(record.bad_rows.examples[reason])
        console.print(f"left out: {count} rows: {reason} ({places})", highlight=False, markup=False, soft_wrap=True)
    if record.validation_fraction and not dataset.num_tokens("validation"):
        console.print(
            "no document fell into the validation split: add documents or raise --validation-fraction", soft_wrap=True
        )
