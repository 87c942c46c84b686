"""What the benchmarks' command lines have in common."""

import argparse
from pathlib import Path


def benchmark_parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser for ``python -m module``, described by the first line of its docstring."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", allow_abbrev=False, description=(doc or "").split("\n")[0]
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("benchmarks/results"),
        metavar="DIR",
        help="where tables, samples and plots go (default benchmarks/results)",
    )
    return parser


def count(text: str) -> int:
    """The type of an argument that is a whole number from 1 on."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a whole number and at least 1, got {text!r}")
    return int(text)
