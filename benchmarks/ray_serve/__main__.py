"""Two replicas against one, and routing by work against turns, on this machine.

``python -m benchmarks.ray_serve --model DIR``: needs two cores of its own. Writes samples as JSON,
and a table.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.load.mix import parse_mix
from benchmarks.percentiles import percentile
from benchmarks.provenance import provenance, typed
from benchmarks.ray_serve.cluster import LocalCluster
from benchmarks.ray_serve.measure import ROUTERS, Latencies, latencies, scaling

_RESULTS = Path(__file__).parent.parent / "results"
_PACKAGES = ("ray", "sglang", "torch")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ray_serve", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--scaling-mix", default="512x512:steps=8")
    parser.add_argument(
        "--routing-mix",
        default="256x256:steps=8:weight=11,512x512:steps=8:weight=2,1024x1024:steps=8:weight=1",
    )
    parser.add_argument("--load", type=float, default=0.6, help="of the most that they do")
    parser.add_argument("--requests", type=int, default=60, help="of each measurement")
    parser.add_argument("--clients", type=int, default=8, help="of closed loops")
    parser.add_argument("--rounds", type=int, default=3, help="of each router")
    parser.add_argument("--output", type=Path, default=_RESULTS / "ray_serve")
    args = parser.parse_args(argv)
    routing_mix = parse_mix(args.routing_mix)
    with LocalCluster(args.model) as cluster:
        rates = scaling(cluster, parse_mix(args.scaling_mix), args.requests, args.clients)
        rate, rounds = latencies(
            cluster, routing_mix, args.load, args.requests, args.rounds, args.clients
        )
    results = {
        "provenance": provenance(typed("python -m benchmarks.ray_serve"), _PACKAGES),
        "scaling": {"mix": args.scaling_mix, "requests_per_s": rates},
        "routing": {
            "mix": args.routing_mix,
            "load": args.load,
            "requests_per_s": rate,
            "rounds": [{"router": it.router, "latency_s": it.by_size} for it in rounds],
        },
    }
    args.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    text = table(results)
    args.output.with_suffix(".md").write_text(text)
    print(text)


def table(results: dict[str, Any]) -> str:
    """The results, for a person."""
    rates = {int(size): values for size, values in results["scaling"]["requests_per_s"].items()}
    routing = results["routing"]
    rounds = [Latencies(it["router"], it["latency_s"]) for it in routing["rounds"]]
    ratio = fmean(rates[2]) / fmean(rates[1])
    lines = [
        "# Ray Serve on one machine",
        "",
        f"`{results['provenance']['command']}`, {results['provenance']['cpu_count']} cores.",
        "",
        f"## Two replicas against one ({results['scaling']['mix']}, closed loop)",
        "",
        "| replicas | requests/s, each time |",
        "| --- | --- |",
        *(f"| {size} | {_list(values)} |" for size, values in rates.items()),
        "",
        f"Ratio of the means: **{ratio:.2f}** (target 1.8).",
        "",
        f"## Routing on three replicas ({routing['mix']})",
        "",
        f"{routing['requests_per_s']:.2f} requests/s, {routing['load']:g} of the most they do.",
        "",
        "| size | p95 by work, s | p95 in turn, s | ratio | p50 by work, s | p50 in turn, s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for size in ("all", *rounds[0].by_size):
        by_router = {router: _pooled(rounds, router, size) for router in ROUTERS}
        p95 = [percentile(by_router[router], 95) for router in ROUTERS]
        p50 = [percentile(by_router[router], 50) for router in ROUTERS]
        lines.append(
            f"| {size} | {p95[0]:.2f} | {p95[1]:.2f} | {p95[0] / p95[1]:.2f} "
            f"| {p50[0]:.2f} | {p50[1]:.2f} |"
        )
    each = {
        router: [percentile(it.all, 95) for it in rounds if it.router == router]
        for router in ROUTERS
    }
    ratios = [ours / theirs for ours, theirs in zip(*each.values(), strict=True)]
    lines += [
        "",
        f"p95 of all sizes, by work over in turn, round by round: {_list(ratios)} (target 0.75).",
        "",
    ]
    return "\n".join(lines)


def _pooled(rounds: Sequence[Latencies], router: str, size: str) -> list[float]:
    chosen = [it for it in rounds if it.router == router]
    return [x for it in chosen for x in (it.all if size == "all" else it.by_size[size])]


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


if __name__ == "__main__":
    main()
