"""Requests whose client goes away, over a real server and over the bare ASGI interface."""

import asyncio
import contextlib
import http.client
import json
import logging
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import StreamingResponse

from krea2_srt.disconnects import CancelOnDisconnect, add_to_app
from tests.channel import PATIENCE_S, wait_until

POST = {"type": "http", "method": "POST"}
BODY_END = {"type": "http.request", "body": b"", "more_body": False}
GONE = {"type": "http.disconnect"}


@dataclass
class Site:
    """A running server, and what its handlers have lived through."""

    port: int = 0
    counts: Counter = field(default_factory=Counter)

    def wait_for(self, **counts: int) -> None:
        wait_until(lambda: all(self.counts[name] >= n for name, n in counts.items()))

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)

    def start(self, method: str, path: str, body: object = None) -> http.client.HTTPConnection:
        """Send a request without waiting for its answer."""
        connection = self.connect()
        connection.request(method, path, json.dumps(body), {"content-type": "application/json"})
        return connection

    def ask(self, method: str, path: str, body: object = None) -> object:
        with contextlib.closing(self.start(method, path, body)) as connection:
            return json.load(connection.getresponse())


def make_app(site: Site) -> FastAPI:
    """Layered as SGLang's: the handler runs in a task of the http middleware."""
    app = FastAPI()
    app.add_middleware(CORSMiddleware, allow_origins=["*"])

    @app.middleware("http")
    async def pass_on(request: Request, call_next):
        return await call_next(request)

    async def work(name: str, seconds: float) -> None:
        site.counts[f"{name}_started"] += 1
        try:
            await asyncio.sleep(seconds)
            site.counts[f"{name}_finished"] += 1
        except asyncio.CancelledError:
            site.counts[f"{name}_cancelled"] += 1
            raise

    @app.post("/slow")
    async def slow(body: dict) -> dict:
        await work("slow", body["seconds"])
        return body

    @app.get("/slow")
    async def slow_get() -> dict:
        await work("get", 0.5)
        return {}

    @app.post("/length")
    async def length(request: Request) -> int:
        return len(await request.body())

    @app.post("/polling")
    async def polling(request: Request) -> list[bool]:
        await request.body()
        polls = [await request.is_disconnected() for _ in range(3)]
        await work("polling", 0.2 if request.url.query else 3600)
        return polls

    @app.post("/stream")
    async def stream() -> StreamingResponse:
        async def chunks():
            try:
                for _ in range(50):
                    yield b"x"
                    await asyncio.sleep(0.1)
            except asyncio.CancelledError:
                site.counts["stream_cancelled"] += 1
                raise

        return StreamingResponse(chunks())

    @app.post("/bug")
    async def bug() -> None:
        raise ValueError("a bug of the handler")

    return app


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    site = Site()
    app = add_to_app(make_app, site)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        site.port = listener.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(app, log_config=None))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield site
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


@pytest.fixture(autouse=True)
def fresh(site: Site) -> None:
    site.counts.clear()


def test_a_handler_is_cancelled_when_its_client_hangs_up_and_nothing_is_logged(site, caplog):
    with contextlib.closing(site.start("POST", "/slow", {"seconds": 3600})):
        site.wait_for(slow_started=1)
    site.wait_for(slow_cancelled=1)
    assert site.ask("POST", "/length", None) == 4
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_of_several_only_the_abandoned_are_cancelled(site):
    abandoned = [site.start("POST", "/slow", {"seconds": 3600}) for _ in range(4)]
    patient = [site.start("POST", "/slow", {"seconds": 1, "i": i}) for i in range(4)]
    site.wait_for(slow_started=8)
    for connection in abandoned:
        connection.close()
    for i, connection in enumerate(patient):
        assert json.load(connection.getresponse()) == {"seconds": 1, "i": i}
        connection.close()
    site.wait_for(slow_cancelled=4)
    assert (site.counts["slow_cancelled"], site.counts["slow_finished"]) == (4, 4)


def test_an_abandoned_get_runs_to_its_end(site):
    with contextlib.closing(site.start("GET", "/slow")):
        site.wait_for(get_started=1)
    site.wait_for(get_finished=1)


def test_a_connection_is_kept_for_the_next_request(site):
    with contextlib.closing(site.connect()) as connection:
        connection.connect()
        sock = connection.sock
        headers = {"content-type": "application/json"}
        for i in range(5):
            connection.request("POST", "/slow", json.dumps({"seconds": 0, "i": i}), headers)
            assert json.load(connection.getresponse())["i"] == i
        connection.request("POST", "/slow", '{"seconds": 3600}', headers)
        assert connection.sock is sock
        site.wait_for(slow_started=6)
    site.wait_for(slow_cancelled=1)


def test_a_large_body_arrives_whole(site):
    assert site.ask("POST", "/length", "x" * 20_000_000) == 20_000_002


def test_a_handler_may_poll_for_the_disconnect(site):
    assert site.ask("POST", "/polling?brief") == [False, False, False]
    with contextlib.closing(site.start("POST", "/polling")):
        site.wait_for(polling_started=2)
    site.wait_for(polling_cancelled=1)


def test_an_abandoned_stream_still_ends(site):
    with contextlib.closing(site.start("POST", "/stream")) as connection:
        assert connection.getresponse().read(1) == b"x"
    site.wait_for(stream_cancelled=1)


def test_a_bug_of_a_handler_is_a_500_as_before(site, caplog):
    with contextlib.closing(site.start("POST", "/bug")) as connection:
        assert connection.getresponse().status == 500
    wait_until(lambda: "a bug of the handler" in caplog.text)


# Over the bare interface: what a server cannot be made to do at will.


class Client:
    """The server's side of one exchange: hands out these messages, then waits for the hang-up."""

    def __init__(self, *messages: dict) -> None:
        self.messages = list(messages)
        self.sent: list[dict] = []
        self._gone = asyncio.Event()
        self._waiting = False

    async def receive(self) -> dict:
        if self.messages:
            return self.messages.pop(0)
        assert not self._waiting, "servers have one message for one who waits"
        self._waiting = True
        await self._gone.wait()
        self._waiting = False
        return GONE

    async def send(self, message: dict) -> None:
        self.sent.append(message)

    def hang_up(self) -> None:
        self._gone.set()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def run(app, client: Client, during=None) -> None:
    """Serve one POST, doing something in its course."""

    async def main() -> None:
        task = asyncio.create_task(CancelOnDisconnect(app)(POST, client.receive, client.send))
        await settle()
        if during is not None:
            during(task)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await task
        finally:
            await settle()
            assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


async def forever(scope, receive, send) -> None:
    await receive()
    await asyncio.Event().wait()


def test_a_cancel_from_outside_is_not_swallowed():
    with pytest.raises(asyncio.CancelledError):
        run(forever, Client(BODY_END), lambda task: task.cancel())


def test_a_cancel_from_outside_wins_over_a_hang_up():
    async def slow_to_stop(scope, receive, send) -> None:
        try:
            await forever(scope, receive, send)
        finally:
            await settle()

    client = Client(BODY_END)
    run(slow_to_stop, client, lambda task: client.hang_up())

    async def shut_down(task) -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert task.cancelling() == 1
        task.cancel()

    def both(task) -> None:
        client.hang_up()
        tasks.append(asyncio.ensure_future(shut_down(task)))

    client, tasks = Client(BODY_END), []
    with pytest.raises(asyncio.CancelledError):
        run(slow_to_stop, client, both)
    assert tasks[0].exception() is None


def test_exceptions_pass_even_when_the_client_has_gone():
    async def app(scope, receive, send) -> None:
        try:
            await forever(scope, receive, send)
        finally:
            raise ValueError("a bug")

    client = Client(BODY_END)
    with pytest.raises(ValueError, match="a bug"):
        run(app, client, lambda task: client.hang_up())


def test_nothing_is_read_ahead_of_the_handler():
    part = {"type": "http.request", "body": b"x", "more_body": True}
    client = Client(*[part] * 10)

    async def app(scope, receive, send) -> None:
        assert [await receive() for _ in range(3)] == [part] * 3
        await settle()

    run(app, client)
    assert len(client.messages) == 7


def test_once_the_response_has_started_nothing_is_cancelled():
    client = Client(BODY_END)
    start = {"type": "http.response.start", "status": 200, "headers": []}
    end = {"type": "http.response.body", "body": b"done"}

    async def app(scope, receive, send) -> None:
        await receive()
        await send(start)
        await asyncio.sleep(0)
        # Those who ask are still told, again and again.
        assert [await receive(), await receive()] == [GONE, GONE]
        await settle()
        await send(end)

    run(app, client, lambda task: client.hang_up())
    assert client.sent == [start, end]


def test_a_hang_up_during_the_body_is_the_handlers_to_see():
    seen = []

    async def app(scope, receive, send) -> None:
        seen.append(await receive())
        await settle()
        seen.append("carried on")

    client = Client()
    client.hang_up()
    run(app, client)
    assert seen == [GONE, "carried on"]


@pytest.mark.parametrize(
    "scope",
    [{"type": "lifespan"}, {"type": "websocket"}, {"type": "http", "method": "GET"}],
    ids=str,
)
def test_everything_but_posts_is_handed_on_as_it_is(scope):
    given = []

    async def app(*arguments) -> None:
        given.extend(arguments)

    async def main() -> None:
        client = Client()
        receive, send = client.receive, client.send
        await CancelOnDisconnect(app)(scope, receive, send)
        assert given[0] is scope
        assert given[1] is receive
        assert given[2] is send

    asyncio.run(main())


def test_the_hook_wraps_all_other_middleware():
    def create_app(name: str, *, title: str) -> FastAPI:
        app = FastAPI(title=f"{name} {title}")
        app.add_middleware(CORSMiddleware)
        return app

    app = add_to_app(create_app, "a", title="b")
    assert app.title == "a b"
    assert app.user_middleware[0].cls is CancelOnDisconnect
