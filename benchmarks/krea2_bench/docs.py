"""Figures in the docs: ``python -m krea2_bench.docs`` writes them from benchmarks/results/.

It writes tables of settings too, from their declarations.

Between two comments that a page's reader does not see stands a figure, or a table, that nobody has
typed:

    <!-- =denoise -->0.89<!-- / -->

`krea2_bench.published` says which file it is in, where, and how it is written. ``--check`` changes
nothing and fails if a page is not as the files are; a test does so too.
"""

import argparse
import json
import re
import sys
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from krea2_bench.published import FIGURES, TABLES

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/*.md")

_FIGURE = re.compile(r"<!-- =(?P<name>[\w-]+) -->.*?<!-- / -->", re.DOTALL)
_STEP = re.compile(
    r"\.?(?P<name>[^.\[\]]+)|\[(?P<number>-?\d+)\]|\[(?P<wanted>\w+=[^\]]+)\]|(?P<all>\[\*\])"
)


class FigureError(Exception):
    """A figure that cannot be; the message names the page and the figure."""


def filled(page: str, name: str) -> str:
    """The page with its figures as they are in the files.

    Args:
        page: its text.
        name: of it, for errors.

    Raises:
        FigureError: a figure, a file or a place in it is missing, or a comment has no partner.
    """

    def figure(found: re.Match[str]) -> str:
        key = found["name"]
        try:
            text = f"\n{TABLES[key](results)}\n" if key in TABLES else _written(*FIGURES[key])
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise FigureError(f"{name}: {key}: {type(error).__name__}: {error}") from None
        return f"<!-- ={key} -->{text}<!-- / -->"

    if page.count("<!-- =") != len(_FIGURE.findall(page)):
        raise FigureError(f"{name}: a figure's comment is not as `krea2_bench.docs` expects it")
    return _FIGURE.sub(figure, page)


def looked_up(values: Any, place: str) -> Any:
    """The value at a place; see `krea2_bench.published`.

    Raises:
        LookupError: there is none.
    """
    at = 0
    while at < len(place):
        step = _STEP.match(place, at)
        if step is None:
            raise LookupError(f"{place[at:]!r} is no place")
        at = step.end()
        if step["all"] is not None:
            return fmean(looked_up(item, place[at:]) for item in values)
        if step["name"] is not None:
            values = values[step["name"]]
        elif step["number"] is not None:
            values = values[int(step["number"])]
        else:
            wanted = [text.partition("=")[::2] for text in step["wanted"].split("; ")]
            fits = [v for v in values if all(str(v[key]) == value for key, value in wanted)]
            if len(fits) != 1:
                raise LookupError(f"{step[0]} fits {len(fits)} items")
            (values,) = fits
    return values


def _written(file: str, place: str, form: str) -> str:
    return format(looked_up(results(file), place), form)


@cache
def results(file: str) -> Any:
    """What a file of benchmarks/results/ holds."""
    return json.loads((ROOT / "benchmarks" / "results" / file).read_text(encoding="utf-8"))


def pages() -> list[Path]:
    """All pages that may have figures."""
    return [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m krea2_bench.docs", allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="change nothing, and fail if one must")
    args = parser.parse_args()
    stale = []
    for path in pages():
        name, text = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
        try:
            new = filled(text, name)
        except FigureError as error:
            sys.exit(f"python -m krea2_bench.docs: error: {error}")
        if new != text:
            stale.append(name)
            if not args.check:
                path.write_text(new, encoding="utf-8")
    for name in stale:
        what = "has figures or tables that are stale" if args.check else "written"
        print(f"{name}: {what}")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
