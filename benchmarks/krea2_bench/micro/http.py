"""What the HTTP process adds to a request, and how long it takes to start, beside an engine that
costs nothing.
"""

import asyncio
import sys
import time
from pathlib import Path
from statistics import median

from krea2_bench.http_overhead import PICTURE_BYTES, Connection, Server, fake_engine_process
from krea2_bench.micro.timing import Timed
from krea2_srt.testing.processes import ChildProcess

_BLOCK = 40
_LIMIT_S = 60.0
_IMPORTS = "import fastapi, httpx, orjson, prometheus_client, pydantic_settings, uvicorn, zmq"


def request(folder: Path, rounds: int) -> Timed:
    """A request for a 1 MB image through krea2-serve, against a server that only sends as much."""
    bare = [sys.executable, "-m", "krea2_bench.micro.bare_server", str(PICTURE_BYTES)]
    with (
        ChildProcess(bare, folder / "bare.log", talks=True) as reference,
        fake_engine_process(folder) as endpoint,
        Server(folder, "--engine-endpoints", endpoint) as server,
    ):
        ports = (server.port, int(reference.read_line(_LIMIT_S)))
        ours_ms, bare_ms = asyncio.run(_blocks(ports, rounds))
    return Timed("HTTP request for a 1 MB image", ours_ms, "a server that only sends it", bare_ms)


async def _blocks(ports: tuple[int, int], rounds: int) -> tuple[float, float]:
    """The least median of a block of requests, of each server."""
    connections = [await Connection.open(port) for port in ports]
    found: list[list[float]] = [[], []]
    for number in range(rounds + 1):
        for connection, medians in zip(connections, found, strict=True):
            times = []
            for _ in range(_BLOCK):
                start = time.perf_counter()
                await connection.ask(prompt="x", size="64x64")
                times.append((time.perf_counter() - start) * 1e3)
            if number:
                medians.append(median(times))
    for connection in connections:
        connection.close()
    return min(found[0]), min(found[1])


def start(folder: Path, rounds: int) -> Timed:
    """From nothing to the first answer of ``/ready``, against importing the same libraries."""
    ours, imports = [], []
    with fake_engine_process(folder) as endpoint:
        for _ in range(rounds):
            begin = time.perf_counter()
            with Server(folder, "--engine-endpoints", endpoint):
                ours.append((time.perf_counter() - begin) * 1e3)
            begin = time.perf_counter()
            command = [sys.executable, "-c", _IMPORTS]
            with ChildProcess(command, folder / "imports.log") as child:
                child.finish(_LIMIT_S)
            imports.append((time.perf_counter() - begin) * 1e3)
    return Timed("start of the HTTP process", min(ours), "importing its libraries", min(imports))
