"""Two engines behind one server: work is shared, and one that goes takes only its own with it."""

import threading

import pytest

from krea2_srt.testing.fake_engine import FakeEngine
from tests.channel import wait_until
from tests.server.serving import serve

FIELDS = {"prompt": "x", "size": "64x64"}


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with FakeEngine() as first, FakeEngine() as second:
        flags = ["--engine-endpoints", first.endpoint, "--engine-endpoints", second.endpoint]
        with serve(tmp_path_factory.mktemp("two"), *flags) as server:
            yield server, first, second


@pytest.fixture
def two(running):
    """The server and its engines, with nothing to do at the start of each test."""
    yield running
    for engine in running[1:]:
        engine.hold.clear()
        wait_until(lambda engine=engine: not engine.waiting)
        engine.reset()


def test_requests_go_where_the_least_waits(two):
    server, first, second = two
    first.hold.set()
    second.hold.set()
    threads = [
        threading.Thread(target=server.post, kwargs={**FIELDS, "n": n}) for n in (1, 9, 1, 1, 1)
    ]
    for count, thread in enumerate(threads, 1):
        thread.start()
        wait_until(lambda count=count: first.waiting + second.waiting == count)
    queue = server.get("/v1/queue").json()
    assert (queue["waiting"], queue["running"]) == (5, 0)
    # Where the next one would wait least.
    assert queue["estimated_wait_s"] == 2.5 * min(first.waiting, second.waiting)
    # Small ones are not kept from an engine by a large one, which they go before, but whom they
    # make wait counts: one goes there, and three where nobody else is.
    small = [sum(it.image.num_images == 1 for it in engine.requests) for engine in (first, second)]
    assert sorted(small) == [1, 3]
    first.hold.clear()
    second.hold.clear()
    for thread in threads:
        thread.join()
    queue = server.get("/v1/queue").json()
    assert (queue["replicas"], queue["replicas_ready"]) == (2, 2)
    assert server.metric("krea2_replicas_ready") == 2


def test_every_request_gets_its_own_pictures_from_either(two):
    server, first, second = two
    client = server.client()
    wrong: list[int] = []

    def ask(seed: int) -> None:
        response = client.images.generate(**FIELDS, n=2, extra_body={"seed": seed})
        seeds = [image.model_extra["seed"] for image in response.data]
        if seeds != [seed, seed + 1]:
            wrong.append(seed)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert first.requests
    assert second.requests
    assert len(first.requests) + len(second.requests) == 40
