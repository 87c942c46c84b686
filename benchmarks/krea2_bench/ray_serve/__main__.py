"""Two replicas against one, and routing by work against turns, on this machine.

``python -m krea2_bench.ray_serve --model DIR``: needs two cores of its own, and root, to give each
engine a part of them. Writes samples as JSON, and a table.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from krea2_bench.load.mix import parse_mix
from krea2_bench.percentiles import percentile
from krea2_bench.provenance import provenance
from krea2_bench.ray_serve.cluster import LocalCluster
from krea2_bench.ray_serve.measure import CORES, ROUTERS, Latencies, latencies, scaling

_RESULTS = Path(__file__).parents[2] / "results"
_PACKAGES = ("ray", "sglang", "torch")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m krea2_bench.ray_serve", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--parts", nargs="+", choices=list(_PARTS), default=list(_PARTS))
    parser.add_argument("--scaling-mix", default="512x512:steps=8")
    parser.add_argument(
        "--routing-mix",
        default="256x256:steps=8:weight=11,512x512:steps=8:weight=2,1024x1024:steps=8:weight=1",
    )
    parser.add_argument("--load", type=float, default=0.85, help="of the most that they do")
    parser.add_argument("--scaling-requests", type=int, default=60, help="each time")
    parser.add_argument("--routing-requests", type=int, default=300, help="of a round")
    parser.add_argument("--clients", type=int, default=8, help="of closed loops")
    parser.add_argument("--rounds", type=int, default=3, help="of each router")
    parser.add_argument("--output", type=Path, default=_RESULTS / "ray_serve")
    args = parser.parse_args(argv)
    file = args.output.with_suffix(".json")
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    with LocalCluster(args.model) as cluster:
        for part in args.parts:
            results[part] = {
                "provenance": provenance(_command(), _PACKAGES),
                **_PARTS[part](cluster, args),
            }
            file.write_text(json.dumps(results, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(text := table(results))
    print(text)


def _command() -> list[str]:
    return ["python", "-m", "krea2_bench.ray_serve", *sys.argv[1:]]


def _scaling(cluster: LocalCluster, args: argparse.Namespace) -> dict[str, Any]:
    mix = parse_mix(args.scaling_mix)
    rates = scaling(cluster, mix, args.scaling_requests, args.clients)
    return {"mix": args.scaling_mix, "requests_per_s": rates}


def _routing(cluster: LocalCluster, args: argparse.Namespace) -> dict[str, Any]:
    mix = parse_mix(args.routing_mix)
    count = args.routing_requests
    rate, rounds = latencies(cluster, mix, args.load, count, args.rounds, args.clients)
    return {
        "mix": args.routing_mix,
        "load": args.load,
        "requests_per_s": rate,
        "rounds": [{"router": it.router, "latency_s": it.by_size} for it in rounds],
    }


_PARTS = {"scaling": _scaling, "routing": _routing}


def table(results: dict[str, Any]) -> str:
    """The results, for a person."""
    lines = ["# Ray Serve on one machine", ""]
    if "scaling" in results:
        lines += _scaling_table(results["scaling"])
    if "routing" in results:
        lines += _routing_table(results["routing"])
    return "\n".join(lines)


def _scaling_table(part: dict[str, Any]) -> list[str]:
    rates = {int(size): values for size, values in part["requests_per_s"].items()}
    ratio = fmean(rates[2]) / fmean(rates[1])
    return [
        f"## Two replicas against one: {part['mix']}",
        "",
        _made_by(part),
        "",
        f"| replicas, {CORES:g} of a core each | requests/s of a closed loop, each time |",
        "| --- | --- |",
        *(f"| {size} | {_list(values)} |" for size, values in rates.items()),
        "",
        f"Ratio of the means: **{ratio:.2f}** (target 1.8).",
        "",
    ]


def _routing_table(part: dict[str, Any]) -> list[str]:
    rounds = [Latencies(it["router"], it["latency_s"]) for it in part["rounds"]]
    lines = [
        f"## Routing on three replicas: {part['mix']}",
        "",
        _made_by(part),
        "",
        f"{part['requests_per_s']:.2f} requests/s, {part['load']:g} of the most that they do.",
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
    each = [[percentile(it.all, 95) for it in rounds if it.router == router] for router in ROUTERS]
    ratios = [ours / theirs for ours, theirs in zip(*each, strict=True)]
    return [
        *lines,
        "",
        f"p95 of all sizes, by work over in turn, round by round: {_list(ratios)} (target 0.75).",
        "",
    ]


def _made_by(part: dict[str, Any]) -> str:
    made = part["provenance"]
    return f"`{made['command']}`, {made['date'][:10]}, {made['cpu_count']} cores."


def _pooled(rounds: Sequence[Latencies], router: str, size: str) -> list[float]:
    chosen = [it for it in rounds if it.router == router]
    return [x for it in chosen for x in (it.all if size == "all" else it.by_size[size])]


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


if __name__ == "__main__":
    main()
