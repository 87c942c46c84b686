"""Plots of a study."""

import math
from pathlib import Path
from typing import Any

from krea2_bench.plotting import PlotError, hide, new_figure, plain_numbers, save_png
from krea2_bench.simulation.report import NAME, Study
from krea2_srt.errors import how_to_install

# Okabe and Ito's colours, which colour-blind people tell apart; dashes and markers serve grayscale.
# The third, ours, is wide: others that meet it lie visibly on top.
_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#000000", "linestyle": ":", "marker": "s"},
    {"color": "#7f7f7f", "linestyle": "--", "marker": "D"},
    {"color": "#0072b2", "linestyle": "-", "marker": "o", "linewidth": 3.5, "markersize": 10},
    {"color": "#009e73", "linestyle": (0, (8, 2)), "marker": "v"},
    {"color": "#e69f00", "linestyle": "-.", "marker": "^", "markersize": 5},
)
_CUT = 300.0
"""Slowdowns are drawn up to here."""


def draw(study: Study, folder: Path) -> list[str]:
    """Draw all plots.

    Returns:
        The names of the files.

    Raises:
        PlotError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PlotError(
            f"plots need matplotlib: {how_to_install('bench')}, or --no-plots"
        ) from None
    drawings = {
        f"{NAME}_attainment.png": _attainment,
        f"{NAME}_slowdown.png": _slowdown,
        f"{NAME}_latency.png": _latency,
    }
    for name, drawing in drawings.items():
        figure = drawing(study)
        save_png(figure, folder / name)
        figure.clear()
    return list(drawings)


def _attainment(study: Study) -> Any:
    """Attainment of the worst size class against load, by scheduler."""
    figure, (axes,) = new_figure(1, 1, (7.5, 5.0))
    for style, (name, points) in zip(_STYLES, study["curves"].items(), strict=False):
        loads = [point["load"] for point in points]
        axes.plot(loads, [100 * p["worst_attainment"] for p in points], label=name, **style)
    target = 100 * study["settings"]["target"]
    axes.axhline(target, color="black", linewidth=0.8)
    axes.annotate(
        f"{target:g} %",
        (0.995, target + 0.5),
        (0, 0),
        textcoords="offset points",
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        fontsize=9,
    )
    axes.set(
        xlabel="load (offered work / capacity)",
        ylabel=f"worst size class: in time ({study['settings']['slo_factor']:g} × alone), %",
        ylim=(-2, 102),
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower left", title="scheduler, router")
    return figure


def _slowdown(study: Study) -> Any:
    """95th percentile against load, one panel for each size class."""
    sizes = list(study["alone_s"])
    figure, panels = new_figure(2, -(-len(sizes) // 2), (10.0, 7.0))
    for axes, size in zip(panels, sizes, strict=False):
        for style, (name, points) in zip(_STYLES, study["curves"].items(), strict=False):
            # What is infinite has no point: the line ends.
            values = [p["sizes"].get(size, {}).get("p95_slowdown") or math.nan for p in points]
            axes.plot([point["load"] for point in points], values, label=name, **style)
        axes.axhline(study["settings"]["slo_factor"], color="black", linewidth=0.8)
        axes.set(title=size, yscale="log", ylim=(0.9, _CUT))
        ticks = [1, 3, 10, 30, 100, 300]
        axes.set_yticks(ticks, labels=[str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    hide(panels[len(sizes) :])
    figure.supxlabel("load (offered work / capacity)")
    figure.supylabel("p95 slowdown (latency / time alone); the line is the SLO")
    _legend(figure, panels[0], columns=3)
    return figure


def _latency(study: Study) -> Any:
    """Distribution at one load, one panel for each size class."""
    sizes = list(study["alone_s"])
    figure, panels = new_figure(2, -(-len(sizes) // 2), (10.0, 7.0))
    factor, load = study["settings"]["slo_factor"], study["settings"]["load"]
    chosen = [list(study["curves"]).index(name) for name in study["latencies"]]
    for axes, size in zip(panels, sizes, strict=False):
        for index, (name, found) in zip(chosen, study["latencies"].items(), strict=True):
            style = {key: _STYLES[index][key] for key in ("color", "linestyle")}
            axes.plot(found[size], range(1, 100), label=name, linewidth=1.8, **style)
        slo_s = factor * study["alone_s"][size]
        axes.axvline(slo_s, color="black", linewidth=0.8)
        axes.annotate(" SLO", (slo_s, 2), fontsize=9)
        axes.set(title=size, xscale="log", ylim=(0, 100))
        plain_numbers(axes.xaxis)
        axes.grid(alpha=0.3, which="both")
    hide(panels[len(sizes) :])
    figure.supxlabel(f"latency at load {load:g}, s")
    figure.supylabel("requests, %")
    _legend(figure, panels[0], columns=2)
    return figure


def _legend(figure: Any, axes: Any, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, fontsize=9)
