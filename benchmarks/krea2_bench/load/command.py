"""krea2-bench load: load tests of any OpenAI-style images endpoint."""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from krea2_bench.load.alone import measure_alone
from krea2_bench.load.arguments import add_load_options, endpoint_options, load_of
from krea2_bench.load.endpoint import Endpoint, EndpointOptions
from krea2_bench.load.mix import Kind
from krea2_bench.load.plan import Planned
from krea2_bench.load.points import LoadRunner, Point, allow_many_connections
from krea2_bench.load.results import Results
from krea2_bench.load.summary import Slo
from krea2_bench.load.table import table, warnings
from krea2_bench.provenance import provenance, typed

PACKAGES = ("krea2-srt", "aiohttp", "numpy", "pillow")
INTERRUPTED_STATUS = 130


def add_parser(commands: Any) -> None:
    """The subcommand's options."""
    parser = commands.add_parser(
        "load", help="put load on a server", description=__doc__, allow_abbrev=False
    )
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:30000", help="of the server (default %(default)s)")
    add(
        "--output",
        type=Path,
        default=Path("krea2-bench-load"),
        metavar="PREFIX",
        help="results go to PREFIX.jsonl and PREFIX.json (default %(default)s)",
    )
    add_load_options(parser, requests=100)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The subcommand; returns its exit code."""
    options = endpoint_options(args, args.url)
    mix, plan, points = load_of(args)
    allow_many_connections()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    results = asyncio.run(_measure(args, options, mix, plan, points))
    if results is None:
        print("krea2-bench load: interrupted before there was a result", file=sys.stderr)
        return INTERRUPTED_STATUS
    print(table(results.summary))
    print(f"\n{results.lines_path}, {results.summary_path}")
    for warning in warnings(results.summary):
        print(f"krea2-bench load: warning: {warning}", file=sys.stderr)
    return 0 if results.summary["complete"] else INTERRUPTED_STATUS


async def _measure(
    args: argparse.Namespace,
    options: EndpointOptions,
    mix: Sequence[Kind],
    plan: Sequence[Planned],
    points: Sequence[Point],
) -> Results | None:
    """Run all points; None if that is interrupted before the first."""
    load_runner = LoadRunner()
    async with Endpoint(options) as endpoint:
        await endpoint.find_model()
        with load_runner.handle_signals():
            repeats = 0 if args.slo_s else args.alone
            alone_s = await measure_alone(
                load_runner, endpoint, mix, args.warm_up, repeats, args.seed
            )
            if load_runner.interrupted:
                return None
            slo = Slo.scaled(alone_s, args.slo_scale)
            if args.slo_s:
                slo = Slo({kind.work: args.slo_s for kind in mix})
            run = settings(args, mix) | {"model": endpoint.model}
            with Results(args.output, run, alone_s, slo) as results:
                for number, point in enumerate(points):
                    # What clients have given up on may still be generated, and is not this point's.
                    if args.cancel_rate and number:
                        await measure_alone(load_runner, endpoint, mix[:1], 1, 0, args.seed)
                    if load_runner.interrupted:
                        break
                    results.begin(point)
                    timed = point.timed(plan, args.seed)
                    await load_runner.run(
                        endpoint, timed, point.name, point.concurrency, results.add
                    )
                    results.end()
                results.summary["complete"] = not load_runner.interrupted
    return results


def settings(
    args: argparse.Namespace, mix: Sequence[Kind], packages: Sequence[str] = PACKAGES
) -> dict[str, Any]:
    """How a load test is made, for its file."""
    return {
        **provenance(typed("krea2-bench"), packages),
        "seed": args.seed,
        "mix": {kind.work: kind.weight for kind in mix},
        "stream": args.stream,
        "cancel_rate": args.cancel_rate,
        "slo_scale": None if args.slo_s else args.slo_scale,
    }
