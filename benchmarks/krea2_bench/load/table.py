"""A summary for people: a table for terminals, and what they should know beside it."""

from typing import Any

from krea2_bench.load.outcome import INTERRUPTED
from krea2_bench.load.points import Point

_COLUMNS = [
    "load",
    "done",
    "failed",
    "429",
    "images/s",
    "MP/s",
    "mean s",
    "p50",
    "p95",
    "p99",
]
_LATE_CLIENT_S = 0.05


def table(summary: dict[str, Any]) -> str:
    """For a terminal."""
    rows = [[*_COLUMNS, "in time"]]
    for point in summary["points"]:
        latency = point["latency_s"]["all"] or {}
        in_time = point["slo_attainment"]
        rows.append(
            [
                point_name(point),
                f"{point['done']}/{point['requests']}",
                str(point["failed"]),
                str(point["rejected"]),
                _number(point["images_per_s"]),
                _number(point["megapixels_per_s"]),
                *(_number(latency.get(name)) for name in ("mean", "p50", "p95", "p99")),
                "–" if in_time is None else f"{in_time:.0%}",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row) for row in padded)


def point_name(point: dict[str, Any]) -> str:
    """Name of a point of a summary; see `Point.name`."""
    rate = None if point["rate"] is None else float(point["rate"])
    return Point(point["arrivals"], rate, point["concurrency"]).name


def warnings(summary: dict[str, Any]) -> list[str]:
    """What a reader of the figures should know."""
    found = []
    for point in summary["points"]:
        lag = point["send_lag_s"]
        if lag and lag["p99"] > _LATE_CLIENT_S:
            found.append(
                f"{point_name(point)}: this client sent late (p99 {lag['p99']:.2f} s), which is "
                "part of the latencies: give it a core of its own"
            )
        if point[INTERRUPTED]:
            found.append(f"{point_name(point)}: {point[INTERRUPTED]} requests were interrupted")
        for error, count in list(point["errors"].items())[:3]:
            found.append(f"{point_name(point)}: {count} times: {error}")
    return found


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
