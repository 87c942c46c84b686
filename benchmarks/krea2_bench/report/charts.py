"""Charts of a study: latency and goodput against load, and distributions."""

from typing import Any

import numpy as np

from krea2_bench.load.outcome import DONE
from krea2_bench.load.table import point_name
from krea2_bench.plotting import INK, SERIES, hide, new_figure, plain_numbers, shared_legend
from krea2_bench.report.data import Study

_WIDTH = 4.6
_HEIGHT = 3.4


def latency_against_load(study: Study) -> Any:
    """p50 and p95 of each size, and of all."""
    sizes = ["all", *study.sizes] if len(study.sizes) > 1 else ["all"]
    figure, panels = _panels(len(sizes))
    offered, label = _offered(study)
    for axes, size in zip(panels, sizes, strict=False):
        for style, side in zip(SERIES, study.sides, strict=False):
            for name, width, filled in (("p95", 1.8, True), ("p50", 1.0, False)):
                values = [
                    (study.figures_of(side, point)["latency_s"].get(size) or {}).get(name, np.nan)
                    for point in study.points
                ]
                fill = {} if filled else {"markerfacecolor": "none"}
                axes.plot(offered, values, label=f"{side}, {name}", lw=width, **style, **fill)
        if size != "all" or len(study.sizes) == 1:
            _objective(axes.axhline, study, study.sizes[0] if size == "all" else size)
        axes.set(title=_title(size), xlabel=label, ylabel="latency, s", yscale="log")
        _category_axis(axes, study)
        plain_numbers(axes.yaxis)
        axes.grid()
    hide(panels[len(sizes) :])
    shared_legend(figure, panels)
    return figure


def goodput_against_load(study: Study) -> Any:
    """What is done in time, a second, against what is asked, and the share of it."""
    figure, (rate, share) = _panels(2)
    offered, label = _offered(study)
    for style, side in zip(SERIES, study.sides, strict=False):
        found = [study.figures_of(side, point) for point in study.points]
        goodput = [np.nan if f["goodput_per_s"] is None else f["goodput_per_s"] for f in found]
        in_time = [np.nan if f["slo_attainment"] is None else f["slo_attainment"] for f in found]
        rate.plot(offered, goodput, label=side, lw=1.8, **style)
        share.plot(offered, [100 * x for x in in_time], label=side, lw=1.8, **style)
    if label == _RATE:
        rate.plot(offered, offered, color=INK, lw=0.8, ls=":", label="asked for")
    share.axhline(90, color=INK, lw=0.8, ls=":")
    share.annotate("90 %", (1, 90), (0, 2), xycoords=("axes fraction", "data"),
                   textcoords="offset points", ha="right")  # fmt: skip
    rate.set(xlabel=label, ylabel="goodput: requests in time, 1/s", ylim=(0, None))
    share.set(xlabel=label, ylabel="requests in time, %", ylim=(-3, 103))
    for axes in (rate, share):
        _category_axis(axes, study)
        axes.grid()
    shared_legend(figure, [rate, share])
    return figure


def distributions(study: Study) -> Any:
    """Cumulative distributions of the latency by size, all points together one by one."""
    points, sizes = range(len(study.points)), study.sizes
    figure, panels = _panels(len(points) * len(sizes), columns=len(sizes) if len(sizes) > 1 else 3)
    for number in points:
        for place, size in enumerate(sizes):
            axes = panels[number * len(sizes) + place]
            for style, side in zip(SERIES, study.sides, strict=False):
                found = study.outcomes.get(side, {}).get(number, [])
                done = [x.outcome for x in found if x.outcome.outcome == DONE]
                times = sorted(o.latency_s for o in done if o.size == size)
                if times:
                    shares = 100 * np.arange(1, len(times) + 1) / len(times)
                    line = {key: style[key] for key in ("color", "linestyle")}
                    axes.step(times, shares, where="post", label=side, lw=1.8, **line)
            _objective(axes.axvline, study, size)
            axes.set(
                title=f"{size}, {point_name(study.points[number])}",
                xlabel="latency, s",
                ylabel="requests, %",
                xscale="log",
                ylim=(0, 102),
            )
            plain_numbers(axes.xaxis)
            axes.tick_params("x", rotation=45)
            axes.grid()
    hide(panels[len(points) * len(sizes) :])
    shared_legend(figure, panels)
    return figure


_RATE = "requests asked for, 1/s"


def _offered(study: Study) -> tuple[list[float], str]:
    """Where the points lie, and what that is called."""
    points = study.points
    if all(p["rate"] not in (None, "inf") for p in points):
        return [float(p["rate"]) for p in points], _RATE
    if all(p["concurrency"] for p in points):
        return [float(p["concurrency"]) for p in points], "clients"
    return [float(i) for i in range(len(points))], "load"


def _category_axis(axes: Any, study: Study) -> None:
    """Points that no number orders are named."""
    offered, label = _offered(study)
    if label == "load":
        axes.set_xticks(offered, [point_name(point) for point in study.points])
    else:
        axes.set_xlim(0, 1.08 * max(offered))


def _objective(line: Any, study: Study, size: str) -> None:
    """The objective of a size, if all its requests have the same."""
    limits = {
        seconds for work, seconds in study.summary["slo_s"].items() if work.split()[0] == size
    }
    if len(limits) == 1:
        line(limits.pop(), color=INK, lw=0.8, ls=":", label="in time")


def _panels(count: int, columns: int = 3) -> tuple[Any, list[Any]]:
    columns = min(columns, count)
    rows = -(-count // columns)
    return new_figure(rows, columns, (_WIDTH * columns, _HEIGHT * rows + 0.5))


def _title(size: str) -> str:
    return "all sizes" if size == "all" else size
