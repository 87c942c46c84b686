"""krea2-bench report: a page and pictures of load tests and comparisons."""

import argparse
from pathlib import Path
from typing import Any

from krea2_bench.plotting import PlotError
from krea2_bench.report.data import ReportError, read_study
from krea2_srt.errors import how_to_install


def add_parser(commands: Any) -> None:
    """The subcommand's options."""
    parser = commands.add_parser(
        "report", help="draw results", allow_abbrev=False, description=__doc__
    )
    add = parser.add_argument
    add("results", nargs="+", type=Path, metavar="PREFIX", help="--output of load or compare")
    add("--title", default="Load tests of Krea 2", help="of the page")
    add(
        "--output",
        type=Path,
        default=Path("krea2-bench-report"),
        metavar="DIR",
        help="for report.html and PNGs (default %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The subcommand; returns its exit code."""
    studies = [read_study(prefix) for prefix in args.results]
    names = [study.name for study in studies]
    if len(set(names)) < len(names):
        raise ReportError(f"two results are called {max(names, key=names.count)}")
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        from krea2_bench.report.page import write_report

        files = write_report(studies, args.title, args.output)
    except (ImportError, PlotError) as error:
        raise ReportError(f"{error}; {how_to_install('bench')}") from None
    for file in files:
        print(file)
    return 0
