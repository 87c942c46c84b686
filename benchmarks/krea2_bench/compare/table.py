"""A comparison for terminals."""

from typing import Any

from krea2_bench.load.table import point_name


def table(result: dict[str, Any]) -> str:
    """Every figure of every point, the pictures, and the verdict."""
    lines = []
    baseline = result["baseline"]
    for point in result["points"]:
        for name, figures in point["figures"].items():
            lines.append(f"{point_name(point)}: {name} / {baseline}")
            for figure in figures:
                sides = point["sides"]
                ours, theirs = (value_text(sides[side], figure) for side in (name, baseline))
                lines.append(
                    f"  {figure['figure']:<22}{figure['size']:>10}  {ours:>8}  {theirs:>8}  "
                    f"{interval_text(figure):<28}{figure['verdict']}"
                )
    lines += [text for side in result["servers"] if (text := _failures(result, side))]
    lines += [picture_line(name, baseline, p) for name, p in result["pictures"].items()]
    lines += [verdict(name, baseline, figure) for name, figure in result["overall"].items()]
    return "\n".join(lines)


def verdict(name: str, baseline: str, figure: dict[str, Any]) -> str:
    """The one line that a comparison comes to."""
    match figure["verdict"]:
        case "no difference":
            return f"{name} and {baseline}: no difference in latency ({interval_text(figure)})"
        case "unknown":
            return f"{name} and {baseline}: too few rounds or requests to tell them apart"
    times = f"{interval_text(figure)} times as long"
    return f"{name} is {figure['verdict']}: a request takes {times} as on {baseline}"


def interval_text(figure: dict[str, Any]) -> str:
    """0.53 (0.50–0.57); differences are in percentage points."""
    found = figure["interval"]
    if found is None:
        return "–"
    scale, form = (1.0, "{:.3g}") if figure["kind"] == "ratio" else (100.0, "{:+.0f} pp")
    text = form.format(scale * found["value"])
    if found["low"] is None:
        return text
    low, high = (form.format(scale * found[end]) for end in ("low", "high"))
    return f"{text} ({low} to {high})"


def picture_line(name: str, baseline: str, pictures: dict[str, Any]) -> str:
    """What the comparison of the pictures comes to."""
    if not pictures["compared"]:
        return f"pictures of {name} and {baseline}: none to compare"
    text = f"pictures of {name} and {baseline}: {pictures['equal']} of {pictures['compared']} equal"
    if pictures["psnr_min"] is not None:
        text += f", the others PSNR {pictures['psnr_min']} dB and more"
    if pictures["different"]:
        text += f"; {pictures['different']} ARE DIFFERENT PICTURES (< {pictures['min_psnr']:g} dB)"
    return text


def _failures(result: dict[str, Any], side: str) -> str:
    """What a side has not done: latencies are of what both have."""
    points = [point["sides"][side] for point in result["points"]]
    failed, rejected = (sum(point[name] for point in points) for name in ("failed", "rejected"))
    if not failed + rejected:
        return ""
    requests = sum(point["requests"] for point in points)
    return f"{side}: of {requests} requests {failed} failed, {rejected} were refused"


_NAMES = {"mean latency": "mean", "p50 latency": "p50", "p95 latency": "p95"}


def value_text(summary: dict[str, Any], figure: dict[str, Any]) -> str:
    """One side's own value, where it has one."""
    if (name := _NAMES.get(figure["figure"])) is not None:
        latency = summary["latency_s"].get(figure["size"]) or {}
        return f"{latency[name]:.3g} s" if name in latency else "–"
    match figure["figure"]:
        case "images/s":
            return f"{summary['images_per_s'] or 0:.3g}"
        case "share in time":
            return f"{summary['slo_attainment'] or 0:.0%}"
    return ""
