"""Ours against unmodified SGLang and Diffusers on the CPUs of one machine, in one run.

``python -m krea2_bench.cpu_baseline --model DIR``, where DIR is a checkpoint that
``krea2-demo-model`` has written. Leaves a table and all samples in ``benchmarks/results``.
"""

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from krea2_bench.arguments import benchmark_parser, count
from krea2_bench.measurements import (
    Samples,
    measure_decoders,
    measure_engines,
    measure_memory,
    measure_prompts,
    measure_starts,
)
from krea2_bench.provenance import provenance
from krea2_srt.cli.errors import one_line_errors
from krea2_srt.errors import CheckpointError
from krea2_srt.testing.processes import ProcessError

MODULE = "krea2_bench.cpu_baseline"
PACKAGES = ("krea2-srt", "sglang", "diffusers", "torch")

MAX_RATIO = {"denoise": 0.8, "VAE decode": 0.6, "peak memory": 1.0, "start to picture": 0.4}
"""Targets: ours / theirs by quantity, the largest median."""

MAX_MS = {"cached prompt": 1.0}
"""Targets: ours by quantity; the median is below."""

_COLUMNS = ("figure", "ours", "theirs", "ratio (median)", "spread (min-max)", "target", "met")
_NONE = "–"


@dataclass(frozen=True)
class Figure:
    """What the samples of a quantity come to."""

    samples: Samples

    @property
    def ratios(self) -> list[float]:
        """ours / theirs of each round; empty without theirs."""
        ours, theirs = self.samples.ours, self.samples.theirs
        return [a / b for a, b in zip(ours, theirs, strict=True)] if theirs else []

    @property
    def target(self) -> str | None:
        quantity = self.samples.quantity
        if quantity in MAX_RATIO:
            return f"ratio ≤ {MAX_RATIO[quantity]:.1f}"
        return f"< {MAX_MS[quantity]:g} ms" if quantity in MAX_MS else None

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is none."""
        quantity = self.samples.quantity
        if quantity in MAX_RATIO:
            return median(self.ratios) <= MAX_RATIO[quantity]
        return median(self.samples.ours) < MAX_MS[quantity] if quantity in MAX_MS else None

    def cells(self) -> list[str]:
        """Its row of the table."""
        samples, ratios = self.samples, self.ratios
        spread = [_rounded(f(samples.ours)) for f in (min, max)]
        if ratios:
            spread = [f"{f(ratios):.2f}" for f in (min, max)]
        return [
            f"{samples.quantity}, {samples.detail} ({samples.unit})",
            _rounded(median(samples.ours)),
            _rounded(median(samples.theirs)) if samples.theirs else _NONE,
            f"{median(ratios):.2f}" if ratios else _NONE,
            "-".join(spread) if len(samples.ours) > 1 else _NONE,
            self.target or _NONE,
            {True: "yes", False: "no", None: _NONE}[self.met],
        ]

    def as_dict(self) -> dict[str, Any]:
        """All samples and all that is computed from them."""
        ratios = self.ratios
        return vars(self.samples) | {
            "ratios": ratios,
            "ratio_median": median(ratios) if ratios else None,
            "ratio_min": min(ratios, default=None),
            "ratio_max": max(ratios, default=None),
            "target": self.target,
            "met": self.met,
        }


@dataclass(frozen=True)
class Report:
    """One run.

    Attributes:
        run: how it was made: command, date, versions, the load (1 min) before it, and so on.
        figures: the rows of the table.
        differences: largest difference of the VAE decoders' pixels, by size and dtype.
    """

    run: dict[str, Any]
    figures: list[Figure]
    differences: dict[str, float]

    def markdown(self) -> str:
        rows = [_COLUMNS, ["---"] * len(_COLUMNS), *(figure.cells() for figure in self.figures)]
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        versions = ", ".join(f"{name} {number}" for name, number in self.run["versions"].items())
        differences = ", ".join(f"{name} {d:.1e}" for name, d in self.differences.items())
        return f"""# CPU baseline

`{self.run["command"]}` on {self.run["cpu_count"]} CPUs (load average {self.run["load_average"]:.1f}
at the start), {self.run["date"]}; {versions}.

{table}

Ours and theirs are medians. A ratio is ours / theirs of one round, in which both ran one after
the other; the spread is that of the ratios, or of ours where there is no other side.

Largest difference between the pixels of the two VAE decoders, in [0, 1]: {differences}.
"""

    def write(self, folder: Path) -> None:
        """Write cpu_baseline.json and cpu_baseline.md."""
        content = {
            **self.run,
            "vae_max_abs_difference": self.differences,
            "figures": [figure.as_dict() for figure in self.figures],
        }
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / "cpu_baseline.json").write_text(f"{text}\n", encoding="utf-8")
        (folder / "cpu_baseline.md").write_text(self.markdown(), encoding="utf-8")


def measure(model: Path, rounds: int, starts: int, command: Sequence[str]) -> Report:
    """Take all measurements, one after the other."""
    run = provenance(command, PACKAGES)
    with tempfile.TemporaryDirectory(prefix="cpu_baseline.") as folder:
        scratch = Path(folder)
        decoders, differences = measure_decoders(model, rounds, scratch)
        samples = [
            *measure_engines(model, rounds, scratch),
            *decoders,
            *measure_memory(model, starts, scratch),
            *measure_prompts(model, scratch),
            *measure_starts(model, starts, scratch),
        ]
    return Report(run, [Figure(s) for s in samples], differences)


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    command = ["python", "-m", MODULE, *(sys.argv[1:] if argv is None else argv)]
    # As Ctrl-C: contexts are left, so children end.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with one_line_errors(MODULE):
        if not args.model.is_dir():
            raise CheckpointError(f"checkpoint folder {args.model} does not exist")
        args.output.mkdir(parents=True, exist_ok=True)
        try:
            report = measure(args.model.resolve(), args.rounds, args.starts, command)
        except ProcessError as error:
            sys.exit(f"{MODULE}: error: {error}")
        report.write(args.output)
        print(report.markdown())


def build_parser() -> argparse.ArgumentParser:
    parser = benchmark_parser(MODULE, __doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="demo checkpoint")
    add("--rounds", type=count, default=9, help="pairs of pictures and decodes (default 9)")
    add("--starts", type=count, default=3, help="pairs of whole processes (default 3)")
    return parser


def _rounded(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


if __name__ == "__main__":
    main()
