"""A clock that goes on only while nobody has anything to do, and scripted servers that live by it.

What takes a second takes exactly a second, however busy the machine is, and no time at all.
"""

import asyncio
import selectors
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.bench.fake_server import FakeServer, application


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop that skips the time until its next timer."""

    def __init__(self) -> None:
        self._now = 1000.0
        super().__init__(_SkippingSelector(self))

    def time(self) -> float:
        return self._now

    def skip(self, seconds: float) -> None:
        self._now += seconds + 1e-7  # real timers are never early

    def run_in_executor(  # type: ignore[override]
        self, executor: object, work: Callable[..., Any], *args: object
    ) -> "asyncio.Future[Any]":
        """At once: while a thread works this clock would go on."""
        future = self.create_future()
        try:
            future.set_result(work(*args))
        except Exception as error:
            future.set_exception(error)
        return future


class _SkippingSelector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:  # only a signal can end this
            return super().select(None)
        found = super().select(0)
        if not found:
            self._loop.skip(timeout)
        return found


class VirtualServer:
    """One server of `VirtualServers`; the same from outside as `Fake`."""

    def __init__(self, host: str) -> None:
        self.host, self.url = host, f"http://{host}"
        self.server = FakeServer()

    def script(self, *actions: dict[str, Any]) -> None:
        """What it does from now on; forgets what it has seen."""
        self.server.reset(list(actions))

    @property
    def statistics(self) -> dict[str, Any]:
        return self.server.statistics


class VirtualServers:
    """Servers by host, on the loop of whatever `asyncio.run` runs, at the end of a socket file.

    What is written to such a socket can be read at once, where TCP may take its time.
    """

    def __init__(self, *hosts: str) -> None:
        self.servers = [VirtualServer(host) for host in hosts]

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Until the end of the test."""
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr(asyncio, "run", self._run)
        monkeypatch.setattr(aiohttp, "TCPConnector", self._connector)

    def _connector(self, **options: Any) -> aiohttp.UnixConnector:
        return aiohttp.UnixConnector(str(self._file), **options)

    def _run(self, main: Coroutine[Any, Any, Any]) -> Any:
        with (
            tempfile.TemporaryDirectory() as folder,
            asyncio.Runner(loop_factory=VirtualLoop) as runner,
            pytest.MonkeyPatch.context() as patch,
        ):
            self._file = Path(folder) / "socket"
            patch.setattr(time, "perf_counter", runner.get_loop().time)
            return runner.run(self._beside_servers(main))

    async def _beside_servers(self, main: Coroutine[Any, Any, Any]) -> Any:
        app = web.Application()
        for one in self.servers:
            app.add_domain(one.host, application(one.server))
        serving = web.AppRunner(app, handler_cancellation=True)
        await serving.setup()
        await web.UnixSite(serving, self._file).start()
        try:
            return await main
        finally:
            await serving.cleanup()
