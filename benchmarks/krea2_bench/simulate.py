"""A cluster of replicas, simulated: the engine's own code on virtual clocks.

``python -m krea2_bench.simulate`` compares the engine's policies with request-at-a-time serving on
8 simulated H200 and leaves tables and plots in ``benchmarks/results``. Needs no GPU.
"""

import argparse
import gc
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from krea2_bench.arguments import benchmark_parser, count
from krea2_bench.plotting import PlotError
from krea2_bench.simulation import report, traces
from krea2_bench.simulation.cluster import Hardware
from krea2_bench.simulation.experiment import Experiment
from krea2_bench.simulation.plots import draw
from krea2_bench.simulation.study import Plan, replay, settings, study
from krea2_srt.engine.cost import CostModel, roofline

MODULE = "krea2_bench.simulate"
PACKAGES = ("krea2-srt", "numpy")
QUICK_REQUESTS = 300
QUICK_PLAN = Plan(loads=(0.4, 0.8), seeds=(0,), sensitivities=False)


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    command = shlex.join(["python", "-m", MODULE, *(sys.argv[1:] if argv is None else argv)])
    # Requests and their sequences refer to each other; the default looks for such rings too often.
    gc.set_threshold(100_000, 20, 20)
    hardware = Hardware(args.replicas, args.cost, args.host_overhead_ms)
    requests = args.requests or (QUICK_REQUESTS if args.quick else 20_000)
    experiment = Experiment(hardware, args.mix, requests, args.process)
    plan = QUICK_PLAN if args.quick else Plan(seeds=tuple(range(args.seed, args.seed + args.seeds)))
    plan = replace(plan, load=args.load)
    if args.quick:
        plan = replace(plan, seeds=(args.seed,))
    if args.write_trace:
        traces.write_trace(experiment.trace(plan.load, args.seed), args.write_trace)
        return
    try:
        answers = study(experiment, plan) if args.trace is None else _replay(experiment, args.trace)
        found = {
            "run": _run(command, args, experiment),
            "settings": settings(experiment, plan),
            **answers,
        }
        args.output.mkdir(parents=True, exist_ok=True)
        plots = draw(found, args.output) if args.plots and args.trace is None else []
    except (PlotError, ValueError, OSError) as error:
        sys.exit(f"{MODULE}: error: {error}")
    report.write(found, args.output, plots)
    print(report.markdown(found, plots))


def build_parser() -> argparse.ArgumentParser:
    parser = benchmark_parser(MODULE, __doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="seconds: few requests, two loads, one trace")
    add("--replicas", type=count, default=8, help="engines, one GPU each (default 8)")
    add(
        "--mix",
        type=_mix,
        default=traces.DEFAULT_MIX,
        metavar="SIDE:WEIGHT[:STEPS[:N]],...",
        help="square images by weight (default 256:40,512:30,1024:25,2048:5; 8 steps, 1 image)",
    )
    add(
        "--process",
        choices=traces.PROCESSES,
        default="poisson",
        help="how requests arrive (default poisson)",
    )
    add("--requests", type=count, help="of each simulation (default 20000)")
    add("--load", type=_positive, default=0.8, help="offered work / capacity of the tables (0.8)")
    add("--seed", type=int, default=0, help="of the first trace (default 0)")
    add("--seeds", type=count, default=3, help="traces of the tables (default 3)")
    add(
        "--host-overhead-ms",
        type=_not_negative,
        default=0.3,
        metavar="MS",
        help="added to each unit of work (default 0.3)",
    )
    add(
        "--cost",
        type=_cost,
        default=roofline(),
        metavar="FILE",
        help="JSON with fields of CostModel, which replace the H200's roofline",
    )
    add("--trace", type=Path, metavar="FILE", help="serve this trace instead, as it is")
    add(
        "--write-trace",
        type=Path,
        metavar="FILE",
        help="only write the first trace at the load of the tables; one JSON object a line",
    )
    add("--no-plots", dest="plots", action="store_false", help="tables only")
    return parser


def _replay(experiment: Experiment, path: Path) -> dict[str, Any]:
    trace = traces.read_trace(path)
    experiment.requests = len(trace)
    return replay(experiment, trace)


def _run(command: str, args: argparse.Namespace, experiment: Experiment) -> dict[str, Any]:
    """How it was made."""
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": args.seed,
        "trace": args.trace.name if args.trace else None,
        "requests": experiment.requests,
        "simulations": experiment.simulations,
        "versions": {name: version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
    }


def _mix(text: str) -> tuple[traces.Share, ...]:
    try:
        parts = [part.split(":") for part in text.split(",")]
        mix = tuple(traces.Share(int(p[0]), float(p[1]), *map(int, p[2:])) for p in parts)
    except (ValueError, IndexError, TypeError):
        raise argparse.ArgumentTypeError(
            f"must be SIDE:WEIGHT[:STEPS[:N]],..., got {text}"
        ) from None
    if any(s.side % 16 or min(s.side, s.weight, s.steps, s.num_images) <= 0 for s in mix):
        raise argparse.ArgumentTypeError("sides must be multiples of 16, all numbers above 0")
    return mix


def _cost(text: str) -> CostModel:
    try:
        return replace(roofline(), **json.loads(Path(text).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be greater than 0")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError("must not be negative")
    return value


if __name__ == "__main__":
    main()
