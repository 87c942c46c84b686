"""Two replicas of the real engine: shared load, the death of one, and an orderly end."""

import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.channel import PATIENCE_S, endpoints, statistics, wait_until
from tests.engine_real.conftest import serve
from tests.engine_real.test_sglang_serve import alone, assert_same

pytestmark = pytest.mark.slow

LARGE = {"prompt": "x", "size": "1024x1024", "seed": 3}
SMALL = {"prompt": "x", "size": "64x64", "num_inference_steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def pair(demo_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    with serve(demo_model, folder, "--dp-size", "2", "--num-gpus", "2") as running:
        yield running


@pytest.fixture(scope="module")
def replicas(pair):
    found = endpoints(pair.log)
    assert len(found) == 2
    return found


def in_flight(replicas) -> list[int]:
    return [statistics(endpoint)["requests"] for endpoint in replicas]


def test_small_requests_go_around_a_large_one(pair, replicas, runner):
    with ThreadPoolExecutor(1) as pool:
        before = [statistics(endpoint)["accepted"] for endpoint in replicas]
        large = pool.submit(pair.post, **LARGE, num_inference_steps=20)
        wait_until(lambda: sum(in_flight(replicas)))
        for _ in range(6):
            (picture,) = pair.draw(**SMALL)
            assert_same(picture, alone(runner, "x", 3, 64, 64, 2))
        assert not large.done(), "the large one was too quick for this test"
        after = [statistics(endpoint)["accepted"] for endpoint in replicas]
        assert sorted(b - a for a, b in zip(before, after, strict=True)) == [1, 6]
        assert large.result()[0] == 200


def test_a_dead_replica_loses_only_its_own_requests(pair, replicas, runner):
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(pair.post, **LARGE, num_inference_steps=20)
        wait_until(lambda: sum(in_flight(replicas)) == 1)
        (victim,) = (e for e, n in zip(replicas, in_flight(replicas), strict=True) if n)
        second = pool.submit(pair.post, **LARGE, num_inference_steps=8)
        wait_until(lambda: in_flight(replicas) == [1, 1])
        os.kill(statistics(victim)["pid"], signal.SIGKILL)
        status, body = first.result()
        assert status >= 500
        assert "has exited" in f"{body}{pair.log}"
        assert second.result()[0] == 200, "the other replica's request"
    for _ in range(4):
        (picture,) = pair.draw(**SMALL)
        assert_same(picture, alone(runner, "x", 3, 64, 64, 2))


def test_sigterm_finishes_what_is_in_flight_and_refuses_the_rest(pair, replicas):
    """The fixture checks that the server then ends with exit code 0."""
    with ThreadPoolExecutor(1) as pool:
        last = pool.submit(pair.post, **LARGE, num_inference_steps=8)
        wait_until(lambda: any(works(endpoint) for endpoint in replicas))
        pair.process.send_signal(signal.SIGTERM)
        wait_until(lambda: refuses_connections(pair.port))
        assert last.result()[0] == 200
    pair.process.wait(PATIENCE_S)


def works(endpoint: str) -> bool:
    """Whether it has requests; the replica that was killed above says nothing."""
    try:
        return statistics(endpoint, timeout_s=2)["requests"] > 0
    except TimeoutError:
        return False


def refuses_connections(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return True
    return False
