"""One side of a comparison: its server, what it has done, and what its engine tells."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from krea2_bench.compare.servers import POLL_S, Running, Server
from krea2_bench.load.endpoint import EndpointOptions
from krea2_bench.load.outcome import Outcome


class Interrupted(Exception):
    """Somebody has ended the comparison."""


@dataclass
class ServerUnderTest:
    """A server in the comparison.

    Attributes:
        server: as it was given.
        start: starts it.
        options: how requests are sent to a URL.
        turn_log: where its engine's units of work are told, if it is ours.
        url: of it, while it runs for the whole comparison.
    """

    server: Server
    start: Callable[[], AbstractContextManager[Running]]
    options: Callable[[str], EndpointOptions]
    turn_log: Path
    url: str = ""

    @asynccontextmanager
    async def up(self, interrupted: Callable[[], bool]) -> AsyncIterator[str]:
        """The server, started if it is not running; yields its URL.

        Raises:
            Interrupted: by who does not want to wait until it can generate.
        """
        if self.url:
            yield self.url
            return
        with self.start() as running:
            while not running.ready():
                if interrupted():
                    raise Interrupted
                await asyncio.sleep(POLL_S)
            yield running.url


@dataclass
class Result:
    """What a side has done in a comparison.

    Attributes:
        alone_s: what requests take alone, by their work.
        pictures: of the first requests of the first round, by index.
        outcomes: by point, then by round.
    """

    alone_s: dict[str, float] = field(default_factory=dict)
    pictures: dict[int, tuple[np.ndarray, ...]] = field(default_factory=dict)
    outcomes: defaultdict[int, list[list[Outcome]]] = field(
        default_factory=lambda: defaultdict(list)
    )


class TurnsOf:
    """The part of an engine's turn log that is written from now on.

    Args:
        log: of the engine; it need not exist.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._offset = log.stat().st_size if log.exists() else 0

    def copy(self, target: Path) -> bool:
        """Copy it, behind the log's header; returns whether there is any."""
        if not self._log.exists():
            target.unlink(missing_ok=True)
            return False
        with self._log.open("rb") as log:
            header = log.readline() if self._offset else b""
            log.seek(self._offset)
            target.write_bytes(header + log.read())
        return True
