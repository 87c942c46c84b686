"""Several engines behind one server: work is shared, and what they serve is what it serves."""

import subprocess
import threading
from dataclasses import replace

import pytest

from krea2_srt.testing.fake_engine import MODEL, FakeEngine
from krea2_srt.testing.processes import free_ports
from tests.channel import wait_until
from tests.server.serving import SERVE, serve

FIELDS = {"prompt": "x", "size": "64x64"}
RAW = replace(MODEL, path="/models/krea-2-raw", distilled=False, default_steps=52)


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


def flags_of(*endpoints: str) -> list[str]:
    return [flag for endpoint in endpoints for flag in ("--engine-endpoints", endpoint)]


def test_the_model_is_called_what_the_engines_serve_from_when_they_say_it(tmp_path):
    """Also where the image's variable names another path."""
    port = free_ports(["engine"])["engine"]
    flags = flags_of(f"tcp://127.0.0.1:{port}")
    variables = {"KREA2_SERVE_MODEL_PATH": "krea/Krea-2-Turbo"}
    with serve(tmp_path, *flags, environment=variables, ready=False) as server:
        assert server.get("/v1/models").json()["data"] == []
        for answer in (server.get("/v1/models/krea-2-raw"), server.post(**FIELDS, model="x")):
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "engine_unavailable"
        with FakeEngine(port=port, model=RAW):
            wait_until(lambda: server.get("/ready").status_code == 200)
            (model,) = server.get("/v1/models").json()["data"]
            assert (model["id"], model["krea2"]["default_steps"]) == ("krea-2-raw", 52)
            assert server.get("/v1/models/krea-2-raw").json() == model
            assert server.post(**FIELDS, model="krea-2-raw").json()["model"] == "krea-2-raw"
            refused = server.post(**FIELDS, model="krea-2-turbo")
            assert refused.status_code == 404
            message = "model: 'krea-2-turbo' is not served here; krea-2-raw is"
            assert refused.json()["error"]["message"] == message
            wait_until(lambda: "ready: krea-2-raw at " in server.log)
        # Another one in its place is what is served then.
        wait_until(lambda: server.get("/ready").status_code != 200)
        with FakeEngine(port=port):
            wait_until(lambda: server.get("/ready").status_code == 200)
            assert server.post(**FIELDS).json()["model"] == "krea-2-turbo"


SMALL = replace(MODEL, limits=replace(MODEL.limits, max_side=512))


@pytest.mark.parametrize(
    ("model", "described"),
    [(RAW, "/models/krea-2-raw (Raw, "), (SMALL, "krea/Krea-2-Turbo (Turbo, 512 and ")],
    ids=["another model", "another limit"],
)
def test_engines_of_different_models_end_the_start_in_a_line(model, described):
    with FakeEngine() as turbo, FakeEngine(model=model) as raw:
        command = [SERVE, "--port", "0", "--storage", "none"]
        ended = subprocess.run(
            [*command, *flags_of(turbo.endpoint, raw.endpoint)], capture_output=True, text=True
        )
    assert ended.returncode == 2
    (line,) = [one for one in ended.stderr.splitlines() if "krea2-serve: error: " in one]
    assert line.startswith("krea2-serve: error: engine_endpoints: tcp://127.0.0.1:")
    for served in ("krea/Krea-2-Turbo (Turbo, 4096 and ", described, "one model"):
        assert served in line
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_an_engine_of_another_model_that_comes_later_gets_no_requests(tmp_path):
    port = free_ports(["late"])["late"]
    with FakeEngine() as first:
        flags = flags_of(first.endpoint, f"tcp://127.0.0.1:{port}")
        with serve(tmp_path, *flags) as server:
            assert server.post(**FIELDS).status_code == 200
            with FakeEngine(port=port, model=RAW) as late:
                wait_until(lambda: "it gets no requests" in server.log)
                assert [server.post(**FIELDS, n=2).status_code for _ in range(3)] == [200] * 3
                assert late.requests == []
                assert server.get("/v1/queue").json()["replicas_ready"] == 1
            with FakeEngine(port=port):
                wait_until(lambda: server.get("/v1/queue").json()["replicas_ready"] == 2)
