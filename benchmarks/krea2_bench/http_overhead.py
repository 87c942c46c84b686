"""What the HTTP layer costs: time, throughput and memory, beside an engine that costs nothing.

``python -m krea2_bench.http_overhead --model DIR``, where DIR is a checkpoint that
``krea2-demo-model`` has written, for the part that needs the real engine. The server has the first
CPU to itself; client and fake engine share the others. Leaves a table and all figures in
``benchmarks/results``.
"""

import argparse
import asyncio
import contextlib
import json
import os
import pickle
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

import zmq

from krea2_bench.arguments import benchmark_parser, count
from krea2_bench.load.points import allow_many_connections
from krea2_bench.percentiles import percentile
from krea2_bench.provenance import provenance
from krea2_srt.cli.errors import one_line_errors
from krea2_srt.errors import CheckpointError
from krea2_srt.messages import Accepted, Generated, GenerateRequest
from krea2_srt.request import ImageRequest
from krea2_srt.testing.fake_engine import FakeEngine
from krea2_srt.testing.krea2_serve import Krea2Serve
from krea2_srt.testing.processes import ChildProcess

MODULE = "krea2_bench.http_overhead"
PACKAGES = ("krea2-srt", "fastapi", "uvicorn", "uvloop", "pyzmq", "pydantic")

PICTURE_BYTES = 750_000
"""1 MB in base64."""

CROWD = 1000
CONNECTIONS = 16
READY_S = 300
_CPUS = os.sched_getaffinity(0)
_SERVER_CPUS = {min(_CPUS)}
FLOAT32 = "--dit-precision fp32 --vae-precision fp32 --text-encoder-precisions fp32"


@dataclass(frozen=True)
class Figure:
    """A row of the table.

    Attributes:
        name: what was measured, with its unit.
        value: the median, or the only one.
        low, high: the spread: 5th and 95th percentile, or smallest and largest.
        target: what it must reach; None is no target.
        met: whether it does.
    """

    name: str
    value: float
    low: float
    high: float
    target: str | None = None
    met: bool | None = None

    def cells(self) -> list[str]:
        met = "–" if self.met is None else "yes" if self.met else "no"
        spread = f"{self.low:.4g}-{self.high:.4g}"
        return [self.name, f"{self.value:.4g}", spread, self.target or "–", met]


class Server(Krea2Serve):
    """A context in which ``krea2-serve`` runs; it is ready when it begins.

    Args:
        folder: for its log and its files.
        flags: further ones.
        cpus: that it may use.
    """

    def __init__(self, folder: Path, *flags: str, cpus: Collection[int] = _SERVER_CPUS) -> None:
        super().__init__(folder, [*flags, "--log-level", "info"], start_s=READY_S)
        self._cpus = cpus

    def start(self) -> None:
        super().start()
        os.sched_setaffinity(self.pid, self._cpus)

    def wait_until_up(self) -> None:
        super().wait_until_up()
        self.port = int(self.url.rsplit(":", 1)[1])

    @property
    def memory_mb(self) -> float:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024 / 1e6

    @property
    def cpu_s(self) -> float:
        """Processor time of the HTTP process so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(") ", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Connection:
    """A connection that is kept, with no more client around it than has to be."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int) -> "Connection":
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=2**21))

    async def ask(self, **fields: object) -> int:
        """POST a request; returns its answer's size in bytes.

        Raises:
            RuntimeError: it did not succeed.
        """
        await self.send(**fields)
        head = await self._reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(head.decode())
        length = int(re.search(rb"content-length: (\d+)", head)[1])
        return len(await self._reader.readexactly(length))

    async def send(self, **fields: object) -> None:
        body = json.dumps(fields).encode()
        head = "POST /v1/images/generations HTTP/1.1\r\nhost: x\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        await self._writer.drain()

    async def line_with(self, text: bytes) -> None:
        """Read up to a line that has this in it."""
        while text not in await self._reader.readline():
            pass

    def close(self) -> None:
        self._writer.close()


@contextlib.contextmanager
def fake_engine_process(folder: Path) -> Iterator[str]:
    """A fake engine in a process of its own; yields its endpoint."""
    command = [sys.executable, "-m", "krea2_srt.testing.fake_engine"]
    command += ["--picture-bytes", str(PICTURE_BYTES)]
    with ChildProcess(command, folder / "fake-engine.log", talks=True) as process:
        yield process.read_line(READY_S)


def measure_speed(folder: Path, rounds: int) -> list[Figure]:
    """Latency of one request at a time, and requests per second of many."""
    requests, seconds, speeds, costs = 400, 4.0, [], []

    async def latencies(port: int) -> list[float]:
        connection = await Connection.open(port)
        found = []
        for _ in range(requests):
            start = time.perf_counter()
            await connection.ask(prompt="x", size="64x64")
            found.append((time.perf_counter() - start) * 1e3)
        connection.close()
        return found[requests // 10 :]

    async def throughput(port: int) -> float:
        done = 0
        end = time.perf_counter() + seconds

        async def client() -> None:
            nonlocal done
            connection = await Connection.open(port)
            while time.perf_counter() < end:
                await connection.ask(prompt="x", size="64x64")
                done += 1
            connection.close()

        start = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(CONNECTIONS)))
        return done / (time.perf_counter() - start)

    with (
        fake_engine_process(folder) as endpoint,
        Server(folder, "--engine-endpoints", endpoint) as server,
    ):
        alone = asyncio.run(latencies(server.port))
        for _ in range(rounds):
            before = server.cpu_s
            speeds.append(asyncio.run(throughput(server.port)))
            costs.append((server.cpu_s - before) * 1e3 / (speeds[-1] * seconds))
    p50, speed = statistics.median(alone), statistics.median(speeds)
    return [
        Figure(
            "1 MB base64 image, one at a time, p50 (ms)",
            p50,
            percentile(alone, 5),
            percentile(alone, 95),
            "≤ 5",
            p50 <= 5,
        ),
        Figure(
            f"the same over {CONNECTIONS} connections (requests/s)",
            speed,
            min(speeds),
            max(speeds),
            "≥ 300",
            speed >= 300,
        ),
        Figure(
            "the server's processor time for one (ms)",
            statistics.median(costs),
            min(costs),
            max(costs),
        ),
    ]


def measure_crowd(folder: Path) -> list[Figure]:
    """Memory of the server while a thousand clients wait."""

    async def run(server: Server, engine: FakeEngine) -> tuple[float, float]:
        before = server.memory_mb
        connections = [await Connection.open(server.port) for _ in range(CROWD)]
        for connection in connections:
            await connection.send(prompt="x", size="64x64", stream=True)
        while engine.waiting < CROWD:
            await asyncio.sleep(0.05)
        await asyncio.sleep(1)
        waiting = server.memory_mb
        engine.hold.clear()
        for connection in connections:
            await connection.line_with(b"image_generation.completed")
            connection.close()
        return before, waiting

    with FakeEngine() as engine, Server(folder, "--engine-endpoints", engine.endpoint) as server:
        engine.hold.set()
        before, waiting = asyncio.run(run(server, engine))
    return [
        Figure(
            f"memory with {CROWD} waiting streams (MB)",
            waiting,
            before,
            waiting,
            "< 300",
            waiting < 300,
        )
    ]


def measure_events(folder: Path) -> list[Figure]:
    """From the engine's sending a preview to the client's having it."""
    requests, sent, found = 100, [], []

    async def run(port: int) -> None:
        connection = await Connection.open(port)
        for _ in range(requests):
            await connection.send(
                prompt="x", size="64x64", stream=True, partial_images=1, num_inference_steps=2
            )
            await connection.line_with(b"data: ")
            found.append((time.perf_counter() - sent[-1]) * 1e3)
            await connection.line_with(b": end")
        connection.close()

    with FakeEngine() as engine, Server(folder, "--engine-endpoints", engine.endpoint) as server:
        engine.on_preview = lambda _: sent.append(time.perf_counter())
        asyncio.run(run(server.port))
    warm = found[requests // 10 :]
    p50 = statistics.median(warm)
    return [
        Figure(
            "first event after the engine's preview, p50 (ms)",
            p50,
            percentile(warm, 5),
            percentile(warm, 95),
            "≤ 20",
            p50 <= 20,
        )
    ]


def measure_real_engine(folder: Path, model: Path) -> list[Figure]:
    """A request through HTTP against the same over the engine's channel, in turn."""
    pairs, direct, through = 60, [], []

    async def run(server: Server, channel: zmq.Socket) -> None:
        connection = await Connection.open(server.port)
        for number in range(pairs):
            image = ImageRequest("x", 128, 128, 4, seed=number)
            start = time.perf_counter()
            channel.send_multipart([b"", pickle.dumps(GenerateRequest(uuid4().hex, image))])
            accepted = pickle.loads(channel.recv_multipart()[-1])
            answer = pickle.loads(channel.recv_multipart()[-1])
            direct.append((time.perf_counter() - start) * 1e3)
            assert isinstance(accepted, Accepted)
            assert isinstance(answer, Generated)
            assert answer.error is None
            start = time.perf_counter()
            await connection.ask(prompt="x", size="128x128", num_inference_steps=4, seed=number)
            through.append((time.perf_counter() - start) * 1e3)
        connection.close()

    flags = ["--model-path", str(model), f"--sglang-args={FLOAT32}"]
    with Server(folder, *flags, cpus=_CPUS) as server:
        endpoint = re.search(r"bind at endpoint: (tcp://\S+)", server.log)[1]
        channel = zmq.Context.instance().socket(zmq.DEALER)
        channel.connect(endpoint)
        asyncio.run(run(server, channel))
        channel.close(0)
    extra = [b - a for a, b in zip(direct, through, strict=True)][pairs // 10 :]
    p50 = statistics.median(extra)
    return [
        Figure(
            "HTTP above the real engine, 128x128, p50 (ms)",
            p50,
            percentile(extra, 5),
            percentile(extra, 95),
            "≤ 10",
            p50 <= 10,
        )
    ]


def markdown(run: dict[str, object], figures: Sequence[Figure]) -> str:
    columns = ["figure", "median", "spread", "target", "met"]
    rows = [columns, ["---"] * len(columns), *(figure.cells() for figure in figures)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    return f"""# HTTP overhead

`{run["command"]}` on {run["cpu_count"]} CPUs (load average {run["load_average"]:.1f} at the
start), {run["date"]}; {versions}.

{table}

The server has one CPU to itself, client and fake engine share the rest; with the real engine
nothing is pinned. The spread is the 5th and the 95th percentile of latencies, the smallest and the
largest round of throughputs, and for memory the server before the crowd and with it.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = benchmark_parser(MODULE, __doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="demo checkpoint")
    parser.add_argument("--rounds", type=count, default=5, help="of throughput (default 5)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    run = provenance(["python", "-m", MODULE, *(sys.argv[1:] if argv is None else argv)], PACKAGES)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    allow_many_connections()
    with one_line_errors(MODULE), tempfile.TemporaryDirectory(prefix="http_overhead.") as folder:
        if not args.model.is_dir():
            raise CheckpointError(f"checkpoint folder {args.model} does not exist")
        args.output.mkdir(parents=True, exist_ok=True)
        scratch = Path(folder)
        figures = measure_real_engine(scratch, args.model.resolve())
        # This process and its children but the server.
        os.sched_setaffinity(0, (_CPUS - _SERVER_CPUS) or _CPUS)
        figures = [
            *measure_speed(scratch, args.rounds),
            *measure_crowd(scratch),
            *measure_events(scratch),
            *figures,
        ]
    content = {**run, "figures": [asdict(figure) for figure in figures]}
    text = json.dumps(content, indent=2, ensure_ascii=False)
    (args.output / "http_overhead.json").write_text(f"{text}\n", encoding="utf-8")
    (args.output / "http_overhead.md").write_text(markdown(run, figures), encoding="utf-8")
    print(markdown(run, figures))


if __name__ == "__main__":
    main()
