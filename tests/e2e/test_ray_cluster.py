"""The application on a real Ray cluster.

With the real engine what only that can keep: its pictures, its cancellations, and that its
processes go and come. What Ray Serve, routers and supervisors do is the same with an engine that
starts at once, and takes seconds then.
"""

import os
import signal

import httpx
import psutil
import pytest

from krea2_srt.testing.load import DONE, Load, ended_by_server
from tests.channel import wait_until
from tests.e2e.conftest import Cluster
from tests.e2e.fake_replica import FakeReplica

pytestmark = [
    pytest.mark.slow,
    # Ray of this version deprecates fields of its own models, and leaves sockets to the collector.
    pytest.mark.filterwarnings("default"),
]

START_S = 1200

THINK_S = 2.0
"""Pause of a client while an engine starts, which needs the cores; the promise needs no crowd."""


REAL = 2
"""Replicas with the real engine. They are started once, by the first test that needs them."""


@pytest.fixture(scope="module")
def real_cluster(cluster: Cluster) -> Cluster:
    """As each test leaves it: with all its replicas ready."""
    cluster.ray.deploy(min_replicas=REAL, max_replicas=REAL)
    return cluster


def test_the_official_client_generates_streams_and_cancels(real_cluster: Cluster):
    cluster = real_cluster
    client = cluster.client()
    first, second = (
        client.images.generate(prompt="a fox", size="64x64", extra_body={"seed": 7})
        for _ in range(2)
    )
    # Two replicas, one picture.
    assert first.data[0].b64_json == second.data[0].b64_json
    events = list(
        client.images.generate(prompt="a fox", size="64x64", stream=True, partial_images=2)
    )
    assert [event.type.rsplit(".")[-1] for event in events] == ["partial_image"] * 2 + ["completed"]

    stream = client.images.generate(prompt="x", size="1024x1024", stream=True, partial_images=1)
    wait_until(lambda: cluster.ray.queue["running"])
    stream.response.close()
    wait_until(lambda: not cluster.ray.queue["running"])
    assert ended_by_server(cluster.url)["cancelled"] == 1


def test_a_killed_replica_loses_nothing_and_is_replaced(real_cluster: Cluster):
    cluster = real_cluster
    load = Load(cluster.url, clients=6, sizes=("64x64", "256x256"))
    with load.running():
        wait_until(lambda: load.counts()[DONE] > 10)
        victim = cluster.ray.engine_processes()[0]
        engine = psutil.Process(victim).children()[0]
        # Ray's default is 15 more: it starves beside whoever computes.
        assert engine.nice() == os.nice(0)
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: cluster.ray.queue["replicas"] == REAL - 1)
        wait_until(lambda: not engine.is_running())
        load.think_s = THINK_S
        wait_until(lambda: cluster.ray.queue["replicas_ready"] == REAL, START_S)
        load.think_s = 0.0
        before = load.counts()[DONE]
        wait_until(lambda: load.counts()[DONE] > before + 10)
    assert set(load.counts()) == {DONE}, load.counts()


def test_a_killed_engine_is_routed_around_until_its_replica_has_started_it_again(
    real_cluster: Cluster,
):
    cluster = real_cluster
    replicas = cluster.ray.engine_processes()
    load = Load(cluster.url, clients=4, sizes=("256x256",))
    with load.running():
        wait_until(lambda: load.counts()[DONE] > 5)
        psutil.Process(replicas[0]).children()[0].kill()
        wait_until(lambda: cluster.ray.queue["replicas_ready"] == REAL - 1)
        load.think_s = THINK_S
        wait_until(lambda: cluster.ray.queue["replicas_ready"] == REAL, START_S)
    assert set(load.counts()) == {DONE}, load.counts()
    assert sorted(cluster.ray.engine_processes()) == sorted(replicas)


def test_replicas_go_and_come_with_the_load_and_nothing_is_lost(cluster: Cluster):
    cluster.ray.deploy(replica=FakeReplica, min_replicas=1, max_replicas=3, target_queue_s=3)
    loads = []
    for clients, sizes, replicas in (
        (1, ("64x64",), 1),
        (16, ("256x256", "512x512"), 3),
        (1, ("64x64",), 1),
    ):
        load = Load(cluster.url, clients, sizes)
        loads.append(load)
        with load.running():
            wait_until(lambda: cluster.ray.queue["replicas"] == replicas, START_S)  # noqa: B023
            cluster.ray.wait_until_ready(replicas)
            load.wait_for(1)
        assert set(load.counts()) == {DONE}, load.counts()


def test_a_new_version_is_rolled_out_under_load_without_a_failed_request(cluster: Cluster):
    cluster.ray.deploy(replica=FakeReplica, min_replicas=2, max_replicas=2)
    before = set(cluster.ray.engine_processes())
    load = Load(cluster.url, clients=4, sizes=("64x64", "256x256"))
    with load.running():
        wait_until(lambda: load.counts()[DONE] > 5)
        cluster.ray.deploy({"max_n": 3}, replica=FakeReplica, min_replicas=2, max_replicas=2)
        wait_until(lambda: not before & set(cluster.ray.engine_processes()), START_S)
        cluster.ray.wait_until_ready(2)
    assert set(load.counts()) == {DONE}, load.counts()


@pytest.mark.parametrize("prefix", ["/krea", "/v1"])
def test_under_a_prefix_images_have_urls_that_lead_to_them(cluster: Cluster, tmp_path, prefix):
    settings = {"storage": str(tmp_path / "images"), "trusted_proxies": ["127.0.0.1"]}
    cluster.ray.deploy(settings, route_prefix=prefix, replica=FakeReplica)
    body = {"prompt": "a fox", "size": "64x64", "response_format": "url"}
    # Ray's own server says that this one comes from elsewhere.
    forged = {"host": "evil.test", "x-forwarded-for": "1.2.3.4", "x-forwarded-host": "evil.test"}
    for headers in ({}, forged):
        answer = httpx.post(
            f"{cluster.url}{prefix}/v1/images/generations", json=body, headers=headers, timeout=600
        )
        url = answer.json()["data"][0]["url"]
        assert url.startswith(f"{cluster.url}{prefix}/v1/images/files/")
        assert httpx.get(url, timeout=60).headers["content-type"] == "image/png"
