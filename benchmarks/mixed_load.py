"""Small and large images at once: our step scheduler against unmodified SGLang, on CPUs.

``python -m benchmarks.mixed_load --model DIR``, where DIR is a checkpoint that
``krea2-demo-model`` has written. Both servers run side by side; each round plays the same arrivals
(Poisson, open loop: latency counts from the time a request was due) to one and then to the other.
The load is relative to what unmodified SGLang needs for the same requests one after another.
Leaves a table and all samples in ``benchmarks/results``.
"""

import asyncio
import json
import math
import os
import platform
import random
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks.arguments import benchmark_parser, count
from benchmarks.child import Child, ChildError, warm_environment
from benchmarks.measurements import free_ports, progress
from benchmarks.percentiles import percentile
from krea2_srt.cli.errors import one_line_errors
from krea2_srt.errors import CheckpointError

MODULE = "benchmarks.mixed_load"
SIDES = ("ours", "sglang")
SWITCHES = {"ours": "on", "sglang": "off"}
SMALL, LARGE = "256x256", "1024x1024"
SHARE_OF_SMALL = 0.9
LOAD = 0.7
STEPS = 8
START_LIMIT_S = 300.0
ANSWER_LIMIT_S = 600.0


@dataclass(frozen=True)
class Arrival:
    """A request of the trace: when it is due in seconds, and its size."""

    due: float
    size: str
    seed: int


@dataclass(frozen=True)
class Served:
    """What became of it.

    Attributes:
        latency: seconds from when it was due to its picture.
    """

    size: str
    latency: float


class Server:
    """A running `sglang serve`, spoken to as a client would."""

    def __init__(self, name: str, port: int) -> None:
        self.name = name
        self._url = f"http://127.0.0.1:{port}"
        self._client = httpx.AsyncClient(timeout=ANSWER_LIMIT_S, limits=httpx.Limits())

    async def wait_until_ready(self, child: Child) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            with suppress(httpx.HTTPError):
                if (await self._client.get(f"{self._url}/health")).status_code == 200:
                    return
            await asyncio.sleep(0.5)
        raise child.error()

    async def draw(self, size: str, seed: int, timeout: float = ANSWER_LIMIT_S) -> float:
        """Seconds that a picture takes."""
        start = time.perf_counter()
        response = await self._client.post(
            f"{self._url}/v1/images/generations",
            json={
                "prompt": f"a red fox in the snow, number {seed}",
                "size": size,
                "num_inference_steps": STEPS,
                "seed": seed,
                "response_format": "b64_json",
                "output_format": "jpeg",
            },
            timeout=timeout,
        )
        response.raise_for_status()
        if not response.json()["data"]:
            raise RuntimeError(f"{self.name}: no picture")
        return time.perf_counter() - start

    async def play(self, trace: Sequence[Arrival]) -> tuple[list[Served], float]:
        """Send a trace; returns what became of its requests, and seconds until the last one."""
        start = time.perf_counter()

        async def one(arrival: Arrival) -> Served:
            await asyncio.sleep(max(0.0, start + arrival.due - time.perf_counter()))
            await self.draw(arrival.size, arrival.seed)
            return Served(arrival.size, time.perf_counter() - start - arrival.due)

        served = await asyncio.gather(*(one(arrival) for arrival in trace))
        return list(served), time.perf_counter() - start

    async def after_hang_ups(self, seed: int) -> float:
        """Seconds of a small request after three clients have sent large ones and hung up."""
        for i in range(3):
            with suppress(httpx.TimeoutException):
                await self.draw(LARGE, seed + i, timeout=0.3)
        return await self.draw(SMALL, seed + 3)


def trace(requests: int, per_second: float, seed: int) -> list[Arrival]:
    """Poisson arrivals; the same number of large ones in every trace."""
    random_ = random.Random(seed)
    small = round(requests * SHARE_OF_SMALL)
    sizes = [SMALL] * small + [LARGE] * (requests - small)
    random_.shuffle(sizes)
    due, arrivals = 0.0, []
    for i, size in enumerate(sizes):
        due += random_.expovariate(per_second)
        arrivals.append(Arrival(due, size, 1000 * seed + i))
    return arrivals


@dataclass
class Run:
    """All that was measured; by side, then by round."""

    alone: dict[str, dict[str, float]]
    per_second: float
    served: dict[str, list[list[Served]]]
    seconds: dict[str, list[float]]
    burst_seconds: dict[str, list[float]]
    hang_ups: dict[str, list[float]]


async def measure(model: Path, rounds: int, requests: int, scratch: Path) -> Run:
    """Start both servers and play all rounds."""
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        for side in SIDES:
            progress(f"starting {side}")
            ports = free_ports()
            flags = ["--model-path", str(model), "--host", "127.0.0.1"]
            for name, port in ports.items():
                flags += [f"--{name.replace('_', '-')}", str(port)]
            # An idle SGLang would otherwise keep a core busy, and so slow the other side down.
            command = [_sglang(), "serve", *flags, "--sleep-on-idle"]
            command += ["--output-path", str(scratch / side)]
            child = stack.enter_context(
                Child(
                    command,
                    scratch / f"{side}.log",
                    warm_environment(scratch, SWITCHES[side]),
                )
            )
            servers[side] = Server(side, ports["port"])
            await servers[side].wait_until_ready(child)
        alone: dict[str, dict[str, float]] = {side: {} for side in SIDES}
        for size in (SMALL, LARGE):
            for server in servers.values():
                await server.draw(size, 0)  # warms up
            times: dict[str, list[float]] = {side: [] for side in SIDES}
            for i in range(1, 6):
                for side, server in servers.items():
                    times[side].append(await server.draw(size, i))
            for side in SIDES:
                alone[side][size] = median(times[side])
        work = (
            SHARE_OF_SMALL * alone["sglang"][SMALL] + (1 - SHARE_OF_SMALL) * alone["sglang"][LARGE]
        )
        run = Run(
            alone,
            LOAD / work,
            {side: [] for side in SIDES},
            {side: [] for side in SIDES},
            {side: [] for side in SIDES},
            {side: [] for side in SIDES},
        )
        for number in range(rounds):
            arrivals = trace(requests, run.per_second, number + 1)
            at_once = [Arrival(0.0, a.size, a.seed) for a in arrivals[: requests // 2]]
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                progress(f"round {number + 1} of {rounds}: {side}")
                served, seconds = await servers[side].play(arrivals)
                run.served[side].append(served)
                run.seconds[side].append(seconds)
                run.burst_seconds[side].append((await servers[side].play(at_once))[1])
                run.hang_ups[side].append(await servers[side].after_hang_ups(10**6 * (number + 1)))
                # What unmodified SGLang still draws for nobody must not disturb the next round.
                await servers[side].draw(SMALL, 0)
        return run


def figures(run: Run) -> list[dict[str, Any]]:
    """The rows of the table."""

    def latencies(side: str, size: str, number: int) -> list[float]:
        return [s.latency for s in run.served[side][number] if s.size == size]

    rounds = range(len(run.seconds["ours"]))
    found = []
    for size in (SMALL, LARGE):
        for name, q in (("p50", 50), ("p95", 95)):
            by_round = {
                side: [percentile(latencies(side, size, n), q) for n in rounds] for side in SIDES
            }
            pooled = {
                side: percentile([x for n in rounds for x in latencies(side, size, n)], q)
                for side in SIDES
            }
            found.append(_row(f"{name} of {size}", "s", pooled, by_round))
    images = {
        side: [len(s) / t for s, t in zip(run.served[side], run.seconds[side], strict=True)]
        for side in SIDES
    }
    found.append(_row("throughput at that load", "images/s", _medians(images), images))
    at_once = len(run.served["ours"][0]) // 2
    bursts = {side: [at_once / t for t in run.burst_seconds[side]] for side in SIDES}
    found.append(_row(f"throughput, {at_once} at once", "images/s", _medians(bursts), bursts))
    found.append(_row(f"{SMALL} after three hung up", "s", _medians(run.hang_ups), run.hang_ups))
    delays = {
        side: [max(0.0, s - run.alone[side][SMALL]) for s in run.hang_ups[side]] for side in SIDES
    }
    found.append(_row("its delay by them", "s", _medians(delays), delays))
    # One step of the abandoned ones: of 8, with an eighth of the rest of the request.
    one_step = run.alone["ours"][LARGE] / STEPS
    found[-1]["target"], found[-1]["met"] = f"ours ≤ {one_step:.2f}", found[-1]["ours"] <= one_step
    targets = {
        f"p95 of {SMALL}": ("ratio ≤ 0.25", lambda r: r <= 0.25),
        f"p95 of {LARGE}": ("ratio ≤ 1.5", lambda r: r <= 1.5),
        "throughput at that load": ("ratio ≥ 1.0", lambda r: r >= 1.0),
        f"throughput, {at_once} at once": ("ratio ≥ 1.0", lambda r: r >= 1.0),
    }
    for row in found:
        if row["figure"] in targets:
            row["target"], met = targets[row["figure"]]
            row["met"] = met(row["ratio"])
    return found


def _row(
    figure: str, unit: str, values: dict[str, float], by_round: dict[str, list[float]]
) -> dict[str, Any]:
    ratios = [
        a / b if b else math.nan for a, b in zip(by_round["ours"], by_round["sglang"], strict=True)
    ]
    return {
        "figure": figure,
        "unit": unit,
        **values,
        "ratio": values["ours"] / values["sglang"] if values["sglang"] else math.nan,
        "ratios_by_round": ratios,
        "target": None,
        "met": None,
    }


def _medians(by_side: dict[str, list[float]]) -> dict[str, float]:
    return {side: median(values) for side, values in by_side.items()}


def markdown(meta: dict[str, Any], run: Run, rows: list[dict[str, Any]]) -> str:
    """The table."""
    alone = "; ".join(
        f"{side}: {times[SMALL]:.2f} s and {times[LARGE]:.2f} s"
        for side, times in run.alone.items()
    )
    lines = [
        "# Small and large images at once, on CPUs",
        "",
        f"`{meta['command']}` on {meta['cpus']} CPUs (load average {meta['load_average']:.1f} "
        f"at the start), {meta['date']}; {meta['versions']}.",
        "",
        f"{SHARE_OF_SMALL:.0%} {SMALL} and {1 - SHARE_OF_SMALL:.0%} {LARGE}, {STEPS} steps, "
        f"Poisson arrivals of {run.per_second:.2f} requests/s: {LOAD:.0%} of what unmodified "
        f"SGLang can serve. Alone, {SMALL} and {LARGE} take {alone}.",
        "",
        "| figure | ours | SGLang | ratio | of each round | target | met |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        spread = ", ".join(f"{ratio:.2f}" for ratio in row["ratios_by_round"])
        met = {True: "yes", False: "no", None: "–"}[row["met"]]
        lines.append(
            f"| {row['figure']} ({row['unit']}) | {row['ours']:.2f} | {row['sglang']:.2f} | "
            f"{row['ratio']:.2f} | {spread} | {row['target'] or '–'} | {met} |"
        )
    lines += [
        "",
        "Percentiles are of all rounds together. Latency counts from the time a request was due.",
    ]
    return "\n".join(lines) + "\n"


def _sglang() -> str:
    return str(Path(sys.executable).parent / "sglang")


def main() -> None:
    parser = benchmark_parser(MODULE, __doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="demo checkpoint")
    add("--rounds", type=count, default=4, help="pairs of traces (default 4)")
    add("--requests", type=count, default=60, help="of a trace (default 60)")
    args = parser.parse_args()
    meta = {
        "command": shlex.join(["python", "-m", MODULE, *sys.argv[1:]]),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": ", ".join(
            [f"{name} {version(name)}" for name in ("krea2-srt", "sglang", "torch")]
            + [f"python {platform.python_version()}"]
        ),
    }
    # As Ctrl-C: contexts are left, so children end.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with one_line_errors(MODULE), tempfile.TemporaryDirectory() as scratch:
        if not args.model.is_dir():
            raise CheckpointError(f"checkpoint folder {args.model} does not exist")
        try:
            run = asyncio.run(
                measure(args.model.resolve(), args.rounds, args.requests, Path(scratch))
            )
        except ChildError as error:
            sys.exit(f"{MODULE}: error: {error}")
    rows = figures(run)
    table = markdown(meta, run, rows)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "mixed_load.json").write_text(
        json.dumps({"run": meta, "figures": rows, "samples": asdict(run)}, indent=1) + "\n"
    )
    (args.output / "mixed_load.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
