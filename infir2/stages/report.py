"""`infir2 report RUN [RUN ...]`: one HTML file about one or several runs, curves overlaid, or about a pipeline."""

import argparse
from pathlib import Path

from infir2.durable import check_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run folder; others are compared to the first. Or the folder of a pipeline",
    )
    parser.add_argument("--out", type=Path, help="HTML file to write (default: report.html in the first run folder)")
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="names of the runs in the report, in their order")


def run(args: argparse.Namespace) -> int:
    from infir2.report import is_chain, write_chain_report, write_report

    out = args.out or args.runs[0] / "report.html"
    if args.out:
        check_output(args.out, "--out")
    if len(args.runs) == 1 and is_chain(args.runs[0]):
        write_chain_report(args.runs[0], out)
    else:
        write_report(args.runs, out, labels=args.labels)
    print(f"report written to {out}")
    return 0
