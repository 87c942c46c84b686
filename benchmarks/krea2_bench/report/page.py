"""The page: sections of charts and tables, without anything from elsewhere."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from krea2_bench.compare.table import interval_text, picture_line, value_text, verdict
from krea2_bench.load.table import point_name
from krea2_bench.load.table import warnings as load_warnings
from krea2_bench.plotting import as_svg, plots, save_png
from krea2_bench.report.charts import distributions, goodput_against_load, latency_against_load
from krea2_bench.report.data import ALONE, Study
from krea2_bench.report.floor import share_of_the_floor
from krea2_bench.report.timeline import timeline

_TEMPLATE = "page.html.jinja"


@dataclass(frozen=True)
class Chart:
    """Attributes: its title, what to look at, and the SVG element."""

    title: str
    text: str
    svg: str


@dataclass
class Section:
    """A study on the page: its tables and charts."""

    study: Study
    verdicts: list[str]
    warnings: list[str]
    charts: list[Chart] = field(default_factory=list)


def write_report(studies: Sequence[Study], title: str, folder: Path) -> list[Path]:
    """Write report.html and a PNG of every chart.

    Returns:
        The files, the page first.
    """
    files = [folder / "report.html"]
    sections = []
    with plots():
        for study in studies:
            section = Section(study, _verdicts(study), _warnings(study))
            for name, chart_title, text, draw in _charts(study):
                figure = draw()
                if figure is None:
                    continue
                files.append(folder / f"{study.name}_{name}.png")
                save_png(figure, files[-1])
                svg = as_svg(figure, f"{study.name}-{name}", f"{study.name}: {chart_title}")
                section.charts.append(Chart(chart_title, text, svg))
            sections.append(section)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        point_name=point_name, interval_text=interval_text, value_text=value_text
    )
    page = environment.get_template(_TEMPLATE).render(title=title, sections=sections)
    files[0].write_text(page, encoding="utf-8")
    return files


def _charts(study: Study) -> list[tuple[str, str, str, Callable[[], Any]]]:
    found: list[tuple[str, str, str, Callable[[], Any]]] = [
        (
            "latency",
            "Latency against load",
            "From when a request was to be sent until its image was there. Filled: p95, open: p50.",
            partial(latency_against_load, study),
        )
    ]
    if study.summary["slo_s"]:
        found.append(
            (
                "goodput",
                "Goodput against load",
                _slo_text(study),
                partial(goodput_against_load, study),
            )
        )
    if study.outcomes:
        found.append(
            (
                "distribution",
                "Distribution of latency",
                "The share of requests that took no longer, by size and load.",
                partial(distributions, study),
            )
        )
    for side in study.sides:
        point = _busiest(study)
        of_side = "" if side == ALONE else f" of {side}"
        text = f"{point_name(study.points[point])}, the first requests of the first round. "
        if side in study.turns:
            text += (
                "Underneath, each unit of work of the engine: its width is its time, its height "
                "the images that share it."
            )
        found.append(
            (
                f"timeline_{side}",
                f"One run{of_side}",
                text,
                partial(timeline, study, side, point),
            )
        )
        found.append(
            (
                f"floor_{side}",
                f"Steps{of_side} and what the hardware can do",
                "The least time of a step, by the rate of a large matrix product and of a large "
                "copy on this machine, over the time that it took.",
                partial(share_of_the_floor, study, side),
            )
        )
    return found


def _busiest(study: Study) -> int:
    """The point with the most load: where one sees what shares a forward."""
    loads = [float(p["rate"] or p["concurrency"] or 0) for p in study.points]
    return loads.index(max(loads))


def _slo_text(study: Study) -> str:
    limits = ", ".join(f"{s:.3g} s for {work}" for work, s in study.summary["slo_s"].items())
    scale = study.summary["run"]["slo_scale"]
    baseline = study.summary.get("baseline")
    alone = f", {scale:g} times as long as alone" if scale else ""
    alone += f" on {baseline}" if scale and baseline else ""
    return f"In time means: within {limits}{alone}."


def _verdicts(study: Study) -> list[str]:
    summary = study.summary
    if "overall" not in summary:
        return []
    baseline = summary["baseline"]
    found = [verdict(name, baseline, figure) for name, figure in summary["overall"].items()]
    return found + [picture_line(name, baseline, p) for name, p in summary["pictures"].items()]


def _warnings(study: Study) -> list[str]:
    summary = study.summary
    found = [] if summary["complete"] else ["This run was interrupted: these figures are partial."]
    if "servers" not in summary:
        return found + load_warnings(summary)
    for side in study.sides:
        points = [study.figures_of(side, p) | _load_of(p) for p in study.points]
        found += [f"{side}, {text}" for text in load_warnings({"points": points})]
    return found


def _load_of(point: dict[str, Any]) -> dict[str, Any]:
    return {key: point[key] for key in ("arrivals", "rate", "concurrency")}
