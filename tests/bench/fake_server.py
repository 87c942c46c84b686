"""An images server whose every answer is scripted: ``python -m tests.bench.fake_server``.

Arguments: a port, a script, and after how many requests it dies; all may be left out. Prints its
address, and ends with its standard input. ``POST /script`` takes a list of actions,
which requests take in turn, from the beginning again when it is through:

- ``wait_s``: the time that the answer takes; all requests at once, or one after the other
  (``serial``); ``block_s``: during which nothing else goes on either.
- ``status``: of the answer; 429 and 500 have error bodies.
- ``break``: ``base64``, ``png`` (cut off), ``size``, ``count``, ``json``, ``disconnect``.
- ``shade``: of blue in the pictures.
- ``per_seed_s``: added to the wait, a different part of it for each seed.
"""

import asyncio
import base64
import contextlib
import io
import json
import os
import random
import sys
import urllib.request
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from aiohttp import web
from PIL import Image

from krea2_srt.testing.processes import ChildProcess

MODEL = "fake/krea-2"


class FakeServer:
    """State of the server process."""

    def __init__(self, life: int = -1) -> None:
        self.life = life
        self.reset([{}])

    def reset(self, script: list[dict[str, Any]]) -> None:
        self.script = script
        self.seen: list[dict[str, Any]] = []
        self.in_flight = self.most_in_flight = self.hung_up = 0
        self.lock = asyncio.Lock()
        self.deaf_until = 0.0

    @property
    def statistics(self) -> dict[str, Any]:
        return {
            "seen": self.seen,
            "most_in_flight": self.most_in_flight,
            "hung_up": self.hung_up,
            "in_flight": self.in_flight,
        }

    async def generate(self, request: web.Request) -> web.StreamResponse:
        if len(self.seen) == self.life:
            os._exit(1)
        fields = await request.json()
        await self._while_deaf()
        action = self.script[len(self.seen) % len(self.script)]
        self.seen.append(fields)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._answer(request, fields, action)
        except asyncio.CancelledError:
            self.hung_up += 1
            raise
        finally:
            self.in_flight -= 1

    async def _answer(
        self, request: web.Request, fields: dict[str, Any], action: dict[str, Any]
    ) -> web.StreamResponse:
        wait_s = action.get("wait_s", 0.0)
        wait_s += action.get("per_seed_s", 0.0) * random.Random(fields.get("seed")).random()
        if "block_s" in action:
            self.deaf_until = asyncio.get_running_loop().time() + action["block_s"]
            await self._while_deaf()
        if action.get("serial"):
            async with self.lock:
                await asyncio.sleep(wait_s)
        elif not fields.get("stream"):
            await asyncio.sleep(wait_s)
        await self._while_deaf()
        broken = action.get("break")
        if broken == "disconnect":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if (status := action.get("status", 200)) != 200:
            code = {429: "queue_full"}.get(status, "internal_error")
            return web.json_response({"error": {"message": "no", "code": code}}, status=status)
        if broken == "json":
            return web.Response(text="<html>busy</html>")
        width, height = (int(side) for side in fields["size"].split("x"))
        width += 16 * (broken == "size")
        data = picture(width, height, fields.get("seed", 0), action.get("shade", 80))
        if broken == "png":
            data = data[: len(data) // 2]
        encoded = base64.b64encode(data).decode() if broken != "base64" else "no base64!"
        count = fields.get("n", 1) - (broken == "count")
        timings = {"queue_ms": 100.0, "encode_ms": 5.0, "denoise_ms": 20.0, "decode_ms": 10.0}
        if fields.get("stream"):
            return await self._stream(request, fields, wait_s, encoded, timings)
        images = [{"b64_json": encoded}] * count
        return web.json_response({"data": images, "timings": timings})

    async def _while_deaf(self) -> None:
        await asyncio.sleep(max(0.0, self.deaf_until - asyncio.get_running_loop().time()))

    async def _stream(
        self,
        request: web.Request,
        fields: dict[str, Any],
        wait_s: float,
        encoded: str,
        timings: dict[str, float],
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b": queued\n\n")
        kinds = ["partial_image"] * fields["partial_images"] + ["completed"]
        for kind in kinds:
            await asyncio.sleep(wait_s / len(kinds))
            event = {"type": f"image_generation.{kind}", "b64_json": encoded, "timings": timings}
            data = json.dumps(event)
            await response.write(f"event: x\ndata: {data}\n\n".encode())
        return response


@cache
def picture(width: int, height: int, seed: int, shade: int) -> bytes:
    """A PNG that tells its seed."""
    colour = (seed % 256, seed // 256 % 256, shade)
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "png")
    return file.getvalue()


def application(server: FakeServer) -> web.Application:
    async def script(request: web.Request) -> web.Response:
        server.reset(await request.json())
        return web.Response()

    async def seen(_: web.Request) -> web.Response:
        return web.json_response(server.statistics)

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": MODEL}]})

    async def health(_: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_post("/v1/images/generations", server.generate)
    app.router.add_post("/script", script)
    app.router.add_get("/seen", seen)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/health", health)
    return app


async def serve() -> None:
    server = FakeServer(int(sys.argv[3]) if len(sys.argv) > 3 else -1)
    picture(16, 16, 0, 0)  # loads what draws, which takes long the first time
    runner = web.AppRunner(application(server), handler_cancellation=True)
    await runner.setup()
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    site = web.TCPSite(runner, "127.0.0.1", port, backlog=4096)
    await site.start()
    if len(sys.argv) > 2:
        server.reset(json.loads(sys.argv[2]))
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await runner.cleanup()


class Fake:
    """The server process, from outside."""

    def __init__(self, url: str) -> None:
        self.url = url

    def script(self, *actions: dict[str, Any]) -> None:
        """What it does from now on; forgets what it has seen."""
        request = urllib.request.Request(f"{self.url}/script", json.dumps(actions).encode())
        urllib.request.urlopen(request, timeout=120).read()

    @property
    def statistics(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/seen", timeout=120) as response:
            return dict(json.loads(response.read()))


@contextlib.contextmanager
def fake_server() -> Iterator[Fake]:
    """The server in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.fake_server"]
    with (
        TemporaryDirectory() as folder,
        ChildProcess(
            command, Path(folder) / "fake-server.log", folder=Path(__file__).parents[2], talks=True
        ) as process,
    ):
        yield Fake(process.read_line(60))


if __name__ == "__main__":
    asyncio.run(serve())
