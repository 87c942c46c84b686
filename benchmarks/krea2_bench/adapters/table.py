"""The page of `krea2_bench.adapters`."""

from collections.abc import Sequence
from statistics import median, quantiles
from typing import Any

from krea2_bench.percentiles import percentile


def table(results: dict[str, Any]) -> str:
    """Markdown of the results, beside what was wanted."""
    run, packs, tenants = results["run"], results["packs"], results["tenants"]
    first = [disk - device for disk, device in zip(*results["first"].values(), strict=True)]
    base = _ratios(results["base"]["with adapters about"], results["base"]["without"])
    ours, theirs = (percentile(tenants[name], 95) for name in ("ours", "sglang"))
    rows = (
        (
            "the steps of four images with four different adapters in one pack, over the same "
            "without",
            _spread(_ratios(packs["with"], packs["without"])),
            "at most 1.25",
        ),
        (
            "the first request with an adapter, from its file, less the next one with it, ms",
            _spread(first, 1),
            "at most 50",
        ),
        (
            "a request without adapters where a server has served some, over one where it knows "
            "none",
            _spread(base),
            "1",
        ),
        (
            "p95 of eight tenants' requests, each with an adapter of its own, over SGLang's",
            f"{ours / theirs:.2f}",
            "at most 0.25",
        ),
    )
    return "\n".join(
        (
            "# Adapters",
            "",
            f"`{run['command']}`, {run['date'][:10]}, {run['cpu_count']} cores of {run['cpu']}; "
            "the demo checkpoint, adapters of",
            "rank 16, 256x256, 8 steps. Medians of interleaved rounds, with the middle half.",
            "",
            "| | measured | wanted |",
            "| --- | --- | --- |",
            *(f"| {what} | {found} | {wanted} |" for what, found, wanted in rows),
            "",
            *_about_tenants(tenants, ours, theirs),
            "",
        )
    )


def _about_tenants(tenants: dict[str, Any], ours: float, theirs: float) -> tuple[str, ...]:
    like = tenants["likeness_db"]
    same = " and ".join(map(str, like["same adapter"]))
    return (
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
