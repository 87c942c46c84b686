"""Settings of the threads' waiting: what each costs, alone and beside a process that computes.

``python -m krea2_bench.threads --model DIR`` on cores that nobody else uses. Leaves a table and all
samples in ``benchmarks/results``.
"""

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from krea2_bench.arguments import benchmark_parser, count
from krea2_bench.provenance import provenance
from krea2_bench.threads.measure import MIXED_SIDES, Engines, Setting, Times, running_engines
from krea2_srt.cli.errors import one_line_errors
from krea2_srt.errors import CheckpointError
from krea2_srt.testing.processes import ProcessError

MODULE = "krea2_bench.threads"
_PACKAGES = ("krea2-srt", "torch")
_SETTINGS = "default,100000,20000,10000,5000,2000,1000,passive"


def main(argv: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(MODULE, __doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="checkpoint folder")
    add(
        "--settings",
        type=lambda text: [Setting.parse(name) for name in text.split(",")],
        default=_SETTINGS,
        metavar="NAMES",
        help="ours, default, passive, active or spin counts; the first is what the others are "
        f"compared to (default {_SETTINGS})",
    )
    add("--rounds", type=count, default=12, help="of the mix (default 12)")
    add("--beside-rounds", type=count, default=3, help="beside the neighbour (default 3)")
    args = parser.parse_args(argv)
    with one_line_errors(MODULE):
        if not args.model.is_dir():
            raise CheckpointError(f"checkpoint folder {args.model} does not exist")
        try:
            with (
                tempfile.TemporaryDirectory() as folder,
                running_engines(Path(folder), args.model.resolve(), args.settings) as engines,
            ):
                engines.generate_mix(args.rounds)
                engines.generate_beside(args.settings, args.beside_rounds)
        except ProcessError as error:
            sys.exit(f"{MODULE}: error: {error}")
        args.output.mkdir(parents=True, exist_ok=True)
        results = _results(engines, argv)
        page = table(results)
        (args.output / "threads.json").write_text(json.dumps(results, indent=1) + "\n")
        (args.output / "threads.md").write_text(page)
    print(page)
    return 0


def _results(engines: Engines, argv: Sequence[str] | None) -> dict[str, Any]:
    typed = sys.argv[1:] if argv is None else argv
    settings = [_figures(setting.name, times, engines) for setting, times in engines.times.items()]
    run = provenance(["python", "-m", MODULE, *typed], _PACKAGES)
    return {"run": run, "settings": settings}


def _figures(name: str, times: Times, engines: Engines) -> dict[str, Any]:
    reference = next(iter(engines.times.values()))
    throughput = [1 / ratio for ratio in times.mixed_ratios(reference)]
    return {
        "name": name,
        "alone_ms": round(times.alone_ms, 1),
        "slowest": [round(value, 2) for value in times.slowest],
        "images_per_s": round(len(MIXED_SIDES) / median(times.mixed) * 1e3, 3),
        "throughput": round(median(throughput), 4),
        "throughputs": [round(value, 4) for value in throughput],
    }


def table(results: Mapping[str, Any]) -> str:
    """The page."""
    run, settings = results["run"], results["settings"]
    rows = [
        f"| {each['name']} | {each['alone_ms']:.0f} | {_spread(each['slowest'])} "
        f"| {each['images_per_s']:.2f} | {_spread(each['throughputs'], each['throughput'])} |"
        for each in settings
    ]
    made = f"`{run['command']}`, {run['date'][:10]}, {run['cpu']}, {run['cpu_count']} cores"
    return f"""# How the engine's threads wait

{made}.
The engine generates with the demo checkpoint in float32 on two cores, without a server; a number is
libgomp's `GOMP_SPINCOUNT`. The slowest of eight pictures of 256x256, generated one after the other
beside a process that multiplies matrices with two of torch's threads, is in times of a picture
without that process. Throughput is that of pictures of 256x256 and 512x512 in packs on cores that
nobody else uses, against {settings[0]["name"]} in the same round. Medians of the rounds, least and
most.

| setting | a picture alone, ms | slowest beside, times | images/s | throughput |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}
"""


def _spread(values: Sequence[float], middle: float | None = None) -> str:
    middle = median(values) if middle is None else middle
    return f"{middle:.3g} ({min(values):.3g} to {max(values):.3g})"


if __name__ == "__main__":
    sys.exit(main())
