"""`infir2 report RUN [RUN ...]`: one HTML file about one or several runs, curves overlaid."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folder; others are compared to the first"
    )
    parser.add_argument("--out", type=Path, help="HTML file to write (default: report.html in the first run folder)")
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="names of the runs in the report, in their order")


def run(args: argparse.Namespace) -> int:
    from infir2.report import write_report

    out = args.out or args.runs[0] / "report.html"
    write_report(args.runs, out, labels=args.labels)
    print(f"report written to {out}")
    return 0
