"""The page of `krea2_bench.adapters`."""

from collections.abc import Sequence
from statistics import median, quantiles
from typing import Any

from krea2_bench.percentiles import percentile


def table(results: dict[str, Any]) -> str:
    """The page, in Markdown."""
    run = results["run"]
    about = (
        f"`{run['command']}`, {run['date'][:10]}, {run['cpu_count']} cores of {run['cpu']}.",
        *_about_tenants(results["tenants"]),
    )
    return "\n".join(("# Adapters", "", figures(results), "", *about, ""))


def figures(results: dict[str, Any]) -> str:
    """What was measured, beside what was wanted."""
    packs, tenants = results["packs"], results["tenants"]
    first = [disk - device for disk, device in zip(*results["first"].values(), strict=True)]
    base = _ratios(results["base"]["with adapters about"], results["base"]["without"])
    rows = (
        (
            "four images with four different adapters in one pack: the steps' time over the same "
            "without",
            _spread(_ratios(packs["with"], packs["without"])),
            "at most 1.25",
        ),
        (
            "the first request with an adapter, from its file: ms more than the next one with it",
            _spread(first, 1),
            "at most 50",
        ),
        (
            "a request without adapters: its time where a server has served some, over one that "
            "knows none",
            _spread(base),
            "1",
        ),
        (
            "eight tenants with an adapter each: p95 over that of unmodified SGLang, which "
            "switches by `/v1/set_lora`",
            f"{percentile(tenants['ours'], 95) / percentile(tenants['sglang'], 95):.2f}",
            "at most 0.25",
        ),
    )
    lines = (f"| {what} | {found} | {wanted} |" for what, found, wanted in rows)
    return "\n".join(("| | measured | wanted |", "| --- | --- | --- |", *lines))


def _about_tenants(tenants: dict[str, Any]) -> tuple[str, ...]:
    like = tenants["likeness_db"]
    ours, theirs = (percentile(tenants[name], 95) for name in ("ours", "sglang"))
    same = " and ".join(map(str, like["same adapter"]))
    return (
        "Medians of interleaved rounds, with the middle half; the demo checkpoint, adapters of "
        "rank 16, 256x256, 8 steps.",
        f"Tenants: a request every {tenants['interval_s']:.2f} s, which is what unmodified SGLang "
        "takes for one after another with a",
        f"`/v1/set_lora` before each. p95 here {ours:.2f} s, there {theirs:.2f} s; medians "
        f"{median(tenants['ours']):.2f} and {median(tenants['sglang']):.2f} s. SGLang's pictures",
        f"are {same} dB from ours with the same adapter, {like['another adapter']} dB from ours "
        f"with another, {like['no adapter']} dB from ours without.",
    )


def _ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(ours, theirs, strict=True)]


def _spread(values: Sequence[float], digits: int = 2) -> str:
    low, middle, high = quantiles(values, n=4)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
