"""Clients that are slow, many, or gone: each gets the documented answer, and the server goes on."""

import asyncio
import json
import os
import resource
import signal
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from krea2_srt.testing.fake_engine import FakeEngine
from tests.channel import PATIENCE_S, wait_until
from tests.server.serving import Served, serve
from tests.server.test_hostile_input import raw, still_works

CROWD = 1000
MANY = 20
"""Requests at a time, where they are limited."""

BODY = json.dumps({"prompt": "x", "size": "64x64"}).encode()
HEAD = (
    b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(BODY)
)


@pytest.fixture(scope="module", autouse=True)
def many_files():
    """Each of the crowd is an open file here too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="module")
def impatient(shared_engine: FakeEngine, tmp_path_factory):
    """A server that does not wait long for its clients, nor takes many of them."""
    flags = ["--engine-endpoints", shared_engine.endpoint, "--header-timeout-s", "1"]
    flags += ["--body-timeout-s", "1", "--send-timeout-s", "2", "--max-requests", str(MANY)]
    with serve(tmp_path_factory.mktemp("impatient"), *flags) as server:
        yield server


def connect(server: Served) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.settimeout(PATIENCE_S)
    return connection


def memory_bytes(server: Served) -> int:
    status = Path(f"/proc/{server.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def open_files(server: Served) -> int:
    return len(os.listdir(f"/proc/{server.pid}/fd"))


@pytest.mark.slow
def test_headers_that_trickle_in_are_cut_off(impatient, engine):
    connections = [connect(impatient) for _ in range(200)]
    for connection in connections:
        connection.sendall(b"POST /v1/images/generations HTTP/1.1\r\n")
    still_works(impatient)
    answers = []
    for byte in b"x-slow: 1\r\n" * 3:
        for connection in connections[:1]:
            try:
                connection.sendall(bytes([byte]))
            except OSError:
                break
        time.sleep(0.1)
    for connection in connections:
        answers.append(connection.recv(65536))
        connection.close()
    assert all(answer.startswith(b"HTTP/1.1 408") for answer in answers)
    assert all(b'"code":"request_timeout"' in answer for answer in answers)


def test_a_connection_that_says_nothing_is_closed(impatient, engine):
    assert raw(impatient, b"") == b""


def test_a_body_that_trickles_in_is_cut_off(impatient, engine):
    with connect(impatient) as connection:
        connection.sendall(HEAD + BODY[:5])
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408")
    still_works(impatient)


def test_a_client_that_does_not_read_is_let_go(impatient, engine):
    engine.picture = b"x" * 20_000_000
    before = open_files(impatient)
    with connect(impatient) as connection:
        connection.sendall(HEAD + BODY)
        wait_until(lambda: not engine.waiting and engine.requests)
        wait_until(lambda: "send timeout" in impatient.log)
        wait_until(lambda: open_files(impatient) <= before)
    engine.picture = None
    still_works(impatient)


def test_a_kept_connection_serves_request_after_request(impatient, engine):
    with httpx.Client() as client:
        for pause_s in (0, 0.5, 1.5):
            time.sleep(pause_s)
            url = f"{impatient.url}/v1/images/generations"
            assert client.post(url, json={"prompt": "x", "size": "64x64"}).status_code == 200


@pytest.mark.slow
def test_a_thousand_clients_wait_in_little_memory_and_all_are_served(fake_server, engine):
    engine.hold.set()

    async def run() -> list[bytes]:
        async def one() -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", fake_server.port)
            writer.write(HEAD + BODY)
            try:
                return await reader.read()
            finally:
                writer.close()

        tasks = [asyncio.create_task(one()) for _ in range(CROWD)]
        await asyncio.to_thread(wait_until, lambda: engine.waiting == CROWD)
        # Waiting, they keep nobody from being heard.
        queue = (await asyncio.to_thread(fake_server.get, "/v1/queue")).json()
        assert queue["replicas_ready"] == 1
        assert engine.waiting == CROWD
        assert memory_bytes(fake_server) < 300e6
        engine.hold.clear()
        return await asyncio.gather(*tasks)

    answers = asyncio.run(run())
    assert len(answers) == CROWD
    assert all(answer.startswith(b"HTTP/1.1 200") for answer in answers)
    still_works(fake_server)


@pytest.mark.parametrize("stream", [False, True])
def test_a_storm_of_disconnects_leaves_nothing_behind(fake_server, engine, stream):
    files = open_files(fake_server)
    engine.hold.set()
    body = json.dumps({"prompt": "x", "size": "64x64", "stream": stream}).encode()
    head = HEAD.replace(b"%d" % len(BODY), b"%d" % len(body))
    connections = [connect(fake_server) for _ in range(300)]
    for connection in connections:
        connection.sendall(head + body)
    wait_until(lambda: engine.waiting == 300)
    for connection in connections:
        connection.close()
    wait_until(lambda: engine.waiting == 0)
    assert len(engine.cancelled) == 300
    engine.hold.clear()
    still_works(fake_server)
    wait_until(lambda: open_files(fake_server) <= files + 2)


def test_clients_that_leave_at_any_moment(fake_server, engine):
    """Hang up after anything from nothing to everything has been sent and received."""
    engine.step_s = 0.002
    body = json.dumps({"prompt": "x", "size": "64x64", "stream": True, "partial_images": 3})
    content = body.encode()
    data = HEAD.replace(b"%d" % len(BODY), b"%d" % len(content)) + content
    for number in range(200):
        with connect(fake_server) as connection:
            connection.sendall(data[: max(1, len(data) * number // 100)])
            if number > 100:
                time.sleep((number - 100) / 3000)
    wait_until(lambda: engine.waiting == 0)
    engine.step_s = 0.0
    still_works(fake_server)
    assert "Traceback" not in fake_server.log


def test_more_requests_than_the_limit_are_answered_with_503(impatient, engine):
    engine.hold.set()
    connections = [connect(impatient) for _ in range(MANY)]
    for connection in connections:
        connection.sendall(HEAD + BODY)
    wait_until(lambda: engine.waiting == MANY)
    refused = impatient.post(prompt="x", size="64x64")
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "too_many_requests"
    # Operators are answered all the same.
    for path in ("/health", "/ready", "/metrics", "/v1/queue", "/v1/models"):
        assert impatient.get(path).status_code == 200
    engine.hold.clear()
    for connection in connections:
        with connection:
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    still_works(impatient)


def test_sigterm_finishes_what_is_under_way_and_takes_nothing_new(shared_engine, engine, tmp_path):
    with serve(tmp_path, "--engine-endpoints", engine.endpoint) as server:
        engine.hold.set()
        answers: list[httpx.Response] = []
        stream: list[str] = []

        def ask() -> None:
            answers.append(server.post(prompt="x", size="64x64"))

        def listen() -> None:
            stream.append(server.post(prompt="x", size="64x64", stream=True).text)

        threads = [threading.Thread(target=ask), threading.Thread(target=listen)]
        for thread in threads:
            thread.start()
        wait_until(lambda: engine.waiting == 2)
        server.process.send_signal(signal.SIGTERM)
        wait_until(server.refuses_connections)
        assert not answers
        engine.hold.clear()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert answers[0].status_code == 200
        assert "event: image_generation.completed" in stream[0]
        assert server.process.wait() == 0


def test_what_is_not_done_in_time_is_told_so(shared_engine, engine, tmp_path):
    flags = ["--engine-endpoints", engine.endpoint, "--drain-timeout-s", "1"]
    with serve(tmp_path, *flags) as server:
        engine.hold.set()
        answers: list[httpx.Response] = []
        thread = threading.Thread(
            target=lambda: answers.append(server.post(prompt="x", size="64x64"))
        )
        thread.start()
        wait_until(lambda: engine.waiting == 1)
        server.process.send_signal(signal.SIGTERM)
        thread.join(PATIENCE_S)
        assert answers[0].status_code == 503
        assert answers[0].headers["x-should-retry"] == "true"
        assert server.process.wait() == 0
        engine.hold.clear()


@pytest.mark.parametrize(
    "second", [HEAD + BODY, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n", b"GET /h"]
)
def test_a_client_that_pipelines_and_hangs_up_is_noticed(fake_server, engine, second):
    engine.hold.set()
    with connect(fake_server) as connection:
        connection.sendall(HEAD.replace(b"connection: close\r\n", b"") + BODY + second)
        wait_until(lambda: engine.waiting == 1)
    wait_until(lambda: engine.waiting == 0)
    assert len(engine.cancelled) == 1
    engine.hold.clear()
    still_works(fake_server)
    assert "Traceback" not in fake_server.log


@pytest.mark.slow
def test_slow_readers_that_want_to_close_are_let_go(impatient, engine):
    """What is left may be too little for the transport to tell of it."""
    engine.picture = b"x" * 1_750_000
    before = open_files(impatient)
    connections = []
    for size in range(10):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2304)
        connection.connect(("127.0.0.1", impatient.port))
        connection.sendall(HEAD + BODY)
        connections.append(connection)
        engine.picture = b"x" * (1_690_000 + size * 12_000)
    wait_until(lambda: not engine.waiting and len(engine.requests) == 10)
    wait_until(lambda: open_files(impatient) <= before)
    for connection in connections:
        connection.close()


def test_one_client_does_not_keep_the_others_waiting(fake_server, engine):
    """Bodies that take longest to refuse, and answers that take longest to make."""
    unknown = json.dumps({"prompt": "x", **{f"key{i}": 1 for i in range(70_000)}}).encode()
    lists = b'{"prompt": "x", "user": [' + b",".join([b"[]"] * 300_000) + b"]}"
    engine.picture = b"x" * 12_000_000
    large = json.dumps({"prompt": "x", "size": "64x64", "n": 4}).encode()
    url, headers = f"{fake_server.url}/v1/images/generations", {"content-type": "application/json"}
    heard: list[int] = []
    number, ended = 0, threading.Event()

    def watch() -> None:
        with httpx.Client(timeout=300) as client:
            while not ended.is_set():
                asked_during = number
                client.get(f"{fake_server.url}/health")
                if asked_during == number:
                    heard.append(number)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with httpx.Client(timeout=300) as client:
        for body, status in ((unknown, 400), (lists, 400), (large, 200)) * 4:
            number += 1
            assert client.post(url, content=body, headers=headers).status_code == status
    ended.set()
    watcher.join()
    # While each large answer is made and sent there is time for many others.
    large_ones = range(3, number + 1, 3)
    assert all(Counter(heard)[one] >= 10 for one in large_ones), Counter(heard)
