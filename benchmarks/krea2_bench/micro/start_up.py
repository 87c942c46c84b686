"""How long krea2-serve takes from nothing to a picture, by stage."""

import asyncio
import time
from pathlib import Path

from krea2_bench.compare.servers import ServerError, parse_server, running
from krea2_bench.http_overhead import Connection

MARKS = {
    "listening": "INFO listening at",
    "engine imported": "bind at endpoint",
    "weights loaded": "our runner serves",
    "warm": "step scheduler, policy",
    "ready": "INFO ready: ",
}
"""What its log says at the end of each stage."""

_LIMIT_S = 600.0
_POLL_S = 0.02


def start_up(folder: Path, checkpoint: Path) -> dict[str, float]:
    """Start it once, and have it generate twice.

    Args:
        folder: an empty one, for the server.
        checkpoint: of the model.

    Returns:
        Seconds since the start at the end of each stage of `MARKS`; and what a first and a second
        picture of 256x256 take.

    Raises:
        ServerError: it does not come up.
    """
    found: dict[str, float] = {}
    begin = time.perf_counter()
    with running(parse_server("ours"), str(checkpoint), folder) as server:
        assert server.child is not None
        while "ready" not in found:
            log = server.child.log
            seconds = time.perf_counter() - begin
            for name, text in MARKS.items():
                if name not in found and text in log:
                    found[name] = seconds
            if server.child.ended or seconds > _LIMIT_S:
                raise ServerError(str(server.child.error()))
            time.sleep(_POLL_S)
        return found | asyncio.run(_pictures(int(server.url.rsplit(":", 1)[1])))


async def _pictures(port: int) -> dict[str, float]:
    connection = await Connection.open(port)
    found = {}
    for name in ("first picture", "second picture"):
        begin = time.perf_counter()
        await connection.ask(prompt=name, size="256x256", seed=0)
        found[name] = time.perf_counter() - begin
    connection.close()
    return found
