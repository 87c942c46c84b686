"""The report: a study as JSON, and the page that is written from it."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

Study = dict[str, Any]

NAME = "simulate"
_NONE = "–"
_PLOTS = """## Plots

First trace. A line of p95 slowdowns ends where more than 5 % of the requests fail (edf).
"""


def write(study: Study, folder: Path, plots: Sequence[str]) -> None:
    """Write simulate.json and simulate.md.

    Args:
        study: run, settings and answers.
        folder: exists.
        plots: names of the PNG files in it.
    """
    text = json.dumps(study, indent=1, ensure_ascii=False)
    (folder / f"{NAME}.json").write_text(f"{text}\n", encoding="utf-8")
    (folder / f"{NAME}.md").write_text(markdown(study, plots), encoding="utf-8")


def markdown(study: Study, plots: Sequence[str] = ()) -> str:
    """The page."""
    parts = [_head(study)]
    if "claims" in study:
        parts += [_capacity(study), _claims(study)]
    parts.append(_policies(study))
    if study.get("sensitivity"):
        parts += [_sensitivity(study), _arrivals(study)]
    if plots:
        parts.append(_PLOTS + "".join(f"\n![{name}]({name})\n" for name in plots))
    return "\n".join(parts)


def _head(study: Study) -> str:
    run, settings = study["run"], study["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    if run["trace"]:
        workload = f"Replay of {run['trace']}, {run['requests']} requests"
    else:
        mix = ", ".join(
            f"{share['side']}² {share['weight']:g} ({share['steps']} steps, "
            f"n={share['num_images']})"
            for share in settings["mix"]
        )
        workload = (
            f"{settings['process']} arrivals of {settings['requests']:,} requests by trace; "
            f"sizes and weights: {mix}"
        )
    alone = ", ".join(f"{size} {seconds:.3f} s" for size, seconds in study["alone_s"].items())
    return f"""# Simulated cluster

`{run["command"]}`, {run["date"]}; {versions}; {run["simulations"]} simulations.

The engine's own code on virtual clocks: {settings["replicas"]} replicas, whose work takes what the
cost model says and {settings["host_ms"]:g} ms on the host for each unit of it. It is a model: no
GPU was used, and estimates are exact. {workload}.

The SLO is {settings["slo_factor"]:g} times a request's time alone on an idle replica; mean times
alone: {alone}. Load is offered work (the sum of times alone) / capacity. What arrives in the first
tenth is not counted. A request that fails at its deadline (edf) is a miss; its latency is infinite.

The baseline takes one request at a time from start to end, first come, first served: unmodified
SGLang, whose router is round-robin. Routers: total-work counts the work of all requests on a
replica as if nothing of it were done; least-work counts what is left of it; total-ahead and
work-ahead are the same, but count first of all requests that the policy would run before the new
one; added-wait adds the new one's own work for each request that it would come before. Ours is
added-wait with edf, which without deadlines is srpt.
"""


def _capacity(study: Study) -> str:
    percent = 100 * study["settings"]["target"]
    rows = [
        [name, f"{mean(loads):.2f}", ", ".join(f"{load:.2f}" for load in loads)]
        for name, loads in study["capacity"].items()
    ]
    return _section(
        f"Highest load with at least {percent:g} % of every size class in time",
        ("scheduler, router", "mean", "by trace"),
        rows,
    )


def _claims(study: Study) -> str:
    settings = study["settings"]
    rows = [
        [
            claim["scheduler"],
            claim["baseline"],
            _spread([claim["capacity_ratio"]], ".2f"),
            _yes(claim["capacity_met"]),
            _spread([claim["miss_ratio"]], ".3f"),
            _yes(claim["misses_met"]),
        ]
        for claim in study["claims"]
    ]
    return _section(
        "Against the baseline",
        (
            "scheduler, router",
            "baseline",
            "highest load, ratio",
            f"≥ {settings['min_capacity_ratio']:g}",
            f"misses at load {settings['load']:g}, ratio",
            f"≤ {settings['max_miss_ratio']:g}",
        ),
        rows,
    )


def _policies(study: Study) -> str:
    sizes = list(study["alone_s"])
    rows = []
    for name, found in study["table"].items():
        rows.append(
            [
                name,
                _spread([s["goodput_per_s"] for s in found], ".2f"),
                _spread([s["images_per_s"] for s in found], ".2f"),
                _spread([s["megapixels_per_s"] for s in found], ".2f"),
                _spread([100 * s["utilisation"] for s in found], ".1f"),
                _spread([100 * s["misses"] for s in found], ".2f"),
                *(
                    _spread([s["sizes"][size]["p95_slowdown"] for s in found], ".2f")
                    for size in sizes
                ),
                *(
                    _spread([100 * s["sizes"][size]["attainment"] for s in found], ".1f")
                    for size in sizes
                ),
                _spread([s["jain"] for s in found], ".2f"),
                _spread([s["max_slowdown"] for s in found], ".0f"),
            ]
        )
    load = "the trace's load" if study["run"]["trace"] else f"load {study['settings']['load']:g}"
    columns = (
        "scheduler, router",
        "goodput (images/s)",
        "images/s",
        "megapixels/s",
        "busy %",
        "misses %",
        *(f"p95 slowdown {size}" for size in sizes),
        *(f"in time % {size}" for size in sizes),
        "Jain index",
        "max slowdown",
    )
    default = f"Best goodput at little loss of throughput: **{study['default']}**.\n"
    note = "Mean ± half the range over the traces. Slowdown is latency / time alone.\n"
    latency = _section(
        f"Latency at {load}, seconds: p50 / p95 / p99",
        ("scheduler, router", *sizes),
        [
            [name, *(_latency([s["sizes"][size] for s in found]) for size in sizes)]
            for name, found in study["table"].items()
        ],
    )
    return "\n".join([_section(f"Policies at {load}", columns, rows), note, default, latency])


def _sensitivity(study: Study) -> str:
    rows = [
        [
            row["parameter"],
            row["value"],
            row["router"],
            f"{row['load']:g}",
            f"{row['goodput_per_s']:.2f}",
            f"{100 * row['misses']:.2f}",
            f"{100 * row['worst_attainment']:.1f}",
            f"{row['max_slowdown']:.1f}",
            f"{row['mean_pack']:.2f}",
            f"{row['longest_turn_ms']:.0f}",
        ]
        for row in study["sensitivity"]
    ]
    columns = (
        *("parameter", "value", "router", "load", "goodput (images/s)", "misses %"),
        *("worst class in time %", "max slowdown", "mean pack", "longest turn (ms)"),
    )
    return _section("Sensitivity, srpt, first trace", columns, rows)


def _arrivals(study: Study) -> str:
    rows = [
        [
            process,
            name,
            f"{s['goodput_per_s']:.2f}",
            f"{100 * s['misses']:.2f}",
            f"{100 * s['worst_attainment']:.1f}",
        ]
        for process, found in study["arrivals"].items()
        for name, s in found.items()
    ]
    columns = (
        *("arrivals", "scheduler, router", "goodput (images/s)", "misses %"),
        "worst class in time %",
    )
    load = study["settings"]["load"]
    return _section(f"Other arrivals at load {load:g}, first trace", columns, rows)


def _section(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## {title}\n\n{table}\n"


def _latency(found: Sequence[dict[str, Any]]) -> str:
    return " / ".join(
        _NONE if any(s[key] is None for s in found) else f"{mean(s[key] for s in found):.3g}"
        for key in ("p50_s", "p95_s", "p99_s")
    )


def _spread(values: Sequence[float | None], form: str) -> str:
    """Mean ± half the range; a figure that was infinite is null by now."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "∞"
    text = format(mean(known), form)
    return text if len(known) == 1 else f"{text} ± {(max(known) - min(known)) / 2:{form}}"


def _yes(met: bool) -> str:
    return "yes" if met else "no"
