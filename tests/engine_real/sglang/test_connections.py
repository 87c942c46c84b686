"""Knowing that a client has gone, on real sockets."""

import contextlib
import socket
import subprocess
import sys
import time

import pytest
import zmq

from krea2_srt.sglang.client_monitor import WatchedRouter, events_in_order
from tests.channel import PATIENCE_S


@pytest.fixture
def context():
    # As many threads as SGLang's scheduler has.
    with zmq.Context(io_threads=2) as context:
        events_in_order(context)
        yield context


@pytest.fixture
def router(context):
    socket = context.socket(zmq.ROUTER)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    socket.rcvtimeo = int(PATIENCE_S * 1e3)
    watched = WatchedRouter(socket)
    watched.address = f"tcp://127.0.0.1:{port}"
    yield watched
    watched.close(0)


def connect(context, router, message=b"hello"):
    client = context.socket(zmq.DEALER)
    client.linger = 0
    client.connect(router.address)
    client.send_multipart([b"", message])
    return client


def lost_within(router, seconds: float, every: float = 0.005) -> set[bytes]:
    deadline = time.monotonic() + seconds
    lost: set[bytes] = set()
    while time.monotonic() < deadline and not lost:
        lost |= router.pop_disconnected()
        time.sleep(every)
    return lost


def test_messages_and_replies_pass(context, router):
    client = connect(context, router)
    identity, *frames = router.recv_multipart()
    assert frames == [b"", b"hello"]
    router.send_multipart([identity, b"", b"answer"])
    assert client.recv_multipart() == [b"", b"answer"]
    assert not lost_within(router, 0.1)
    client.close()


def test_a_closed_client_is_lost_once(context, router):
    staying, leaving = connect(context, router), connect(context, router)
    identities = {router.recv_multipart()[0] for _ in range(2)}
    leaving.close()
    lost = lost_within(router, PATIENCE_S)
    assert len(lost) == 1
    assert lost < identities
    assert not lost_within(router, 0.2)
    staying.close()
    assert lost_within(router, PATIENCE_S) == identities - lost


def test_descriptors_are_reused_without_mixing_clients_up(context, router):
    """The kernel gives a new connection the number of the last one that was closed."""
    stays = connect(context, router)
    staying = router.recv_multipart()[0]
    for _ in range(50):
        client = connect(context, router)
        identity = router.recv_multipart()[0]
        assert identity not in router.pop_disconnected()
        client.close()
        assert lost_within(router, PATIENCE_S) == {identity}
    assert staying not in lost_within(router, 0.1)
    stays.close()


@pytest.mark.slow
def test_busy_cores_do_not_mix_clients_up(router):
    """With two I/O threads at work, one in 300 clients was taken for its predecessor."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:
        with zmq.Context() as clients:
            for _ in range(1500):
                client = connect(clients, router)
                identity = router.recv_multipart()[0]
                assert identity not in router.pop_disconnected()
                client.close()
                assert lost_within(router, PATIENCE_S, every=0.0005) == {identity}
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_a_client_gone_before_its_message_was_read_is_lost(context, router):
    connect(context, router).close(1000)
    time.sleep(0.3)
    identity = router.recv_multipart()[0]
    assert lost_within(router, PATIENCE_S) == {identity}


def test_nothing_to_read_is_the_sockets_own_answer(router):
    with pytest.raises(zmq.Again):
        router.recv_multipart(zmq.NOBLOCK)


def test_what_does_not_speak_zeromq_does_no_harm(context, router):
    port = int(router.address.rsplit(":", 1)[1])
    for data in (
        b"GET /metrics HTTP/1.1\r\nhost: x\r\nuser-agent: a scanner\r\n\r\n" + b"x" * 200,
        b"\x01\x00\x01\x01\x03\x00hi",
        b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03" + bytes(range(190)),
        b"\xff" * 64,
    ):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(data)
            time.sleep(0.1)
            with contextlib.suppress(zmq.Again):
                while True:
                    router.recv_multipart(zmq.NOBLOCK)
    client = connect(context, router, b"still")
    assert router.recv_multipart()[-1] == b"still"
    client.close()
