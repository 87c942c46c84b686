"""How plots here look, so that they can be read by all: in light, in the dark, in grey. Draws with
matplotlib, which is imported when it is needed.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from krea2_srt.errors import how_to_install

INK = "#1a1b1c"
"""Text, axes and lines that belong to no series; in a page, the page's own colour of text."""

SERIES: tuple[dict[str, Any], ...] = (
    {"color": "#0072b2", "linestyle": "-", "marker": "o"},
    {"color": "#d55e00", "linestyle": (0, (5, 2)), "marker": "s"},
    {"color": "#009e73", "linestyle": "-.", "marker": "^"},
    {"color": "#cc79a7", "linestyle": ":", "marker": "D"},
)
"""Those of Okabe and Ito's colours, which colour-blind people tell apart, those that stand out from
white and from black; dashes and markers serve where there is no colour.
"""

WORK = {"queue": "#8c8c8c", "encode": "#cc79a7", "step": "#0072b2", "decode": "#d55e00"}
"""Colours of a request's stages, and of the engine's units of work."""

_DPI = 130
_RC: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlesize": 10,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "grid.color": INK,
    "grid.alpha": 0.15,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


class PlotError(Exception):
    """Plots cannot be drawn; the message says what to do."""


@contextmanager
def plots() -> Iterator[None]:
    """While this is entered, figures look as they should.

    Raises:
        PlotError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise PlotError(f"plots need matplotlib: {how_to_install('bench')}") from None
    with matplotlib.rc_context(_RC):
        yield


def new_figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    """A figure, and its axes row by row.

    Args:
        rows, columns: of axes.
        size: in inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def plain_numbers(axis: Any) -> None:
    """Label a logarithmic axis with numbers, not with powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def shared_legend(figure: Any, panels: list[Any]) -> None:
    """One for all panels, above them."""
    unique: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        unique |= dict(zip(labels, handles, strict=True))
    # As many side by side as there is room for.
    columns = min(len(unique), max(2, round(figure.get_figwidth() / 1.6)))
    figure.legend(unique.values(), unique.keys(), loc="outside upper center", ncols=columns)


def hide(spare: list[Any]) -> None:
    """Axes that nothing is drawn in."""
    for axes in spare:
        axes.set_visible(False)


def save_png(figure: Any, path: Path) -> None:
    """On white. No version and no date in the file: equal figures, equal bytes."""
    figure.savefig(path, dpi=_DPI, facecolor="white", metadata={"Software": None})


def as_svg(figure: Any, name: str, title: str) -> str:
    """An SVG element for a page, whose text and axes have the page's colour.

    Args:
        figure: to draw.
        name: unique in the page.
        title: what it shows, for who cannot see it.
    """
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # ids of several figures must differ
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace(INK, "currentColor")
    # Named elements are those of axes and ticks; every figure has the same.
    text = re.sub(r' id="(?!m|p|image|h)[a-z]+\d*_\d+"', "", text)
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
