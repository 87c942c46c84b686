"""Routing among replicas: SGLang's own client, talking to fake schedulers over real sockets."""

import asyncio
import functools
import logging
import math
import pickle
import subprocess
import threading
import time
import zlib
from collections import Counter
from contextlib import suppress
from types import SimpleNamespace

import psutil
import pytest
import zmq

from krea2_srt.routing import ReplicaExited, Replicas
from krea2_srt.sglang.replicas import backend_failure, estimated_ms, forward, replicas_of
from tests.channel import PATIENCE_S

BIG = {"width": 2048, "height": 2048, "num_inference_steps": 52, "guidance_scale": 4.5}


@functools.cache
def sglang() -> SimpleNamespace:
    """What the tests use of SGLang: importing it takes half a minute."""
    from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
    from sglang.multimodal_gen.runtime import scheduler_client
    from sglang.multimodal_gen.runtime.entrypoints import http_server
    from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch, Req

    return SimpleNamespace(
        SamplingParams=SamplingParams,
        scheduler_client=scheduler_client,
        Client=scheduler_client.AsyncSchedulerClient,
        http_server=http_server,
        OutputBatch=OutputBatch,
        Req=Req,
    )


def request(prompt="small", **fields):
    fields = {"width": 256, "height": 256, "num_inference_steps": 8, "guidance_scale": 1, **fields}
    return sglang().Req(sampling_params=sglang().SamplingParams(prompt=prompt, **fields))


class Scheduler(threading.Thread):
    """Answers one request after the other, each after ``ms``; "hold" only when released."""

    def __init__(self, index: int, ms: float) -> None:
        super().__init__(daemon=True)
        self.index, self.ms, self.got = index, ms, Counter()
        self.failing = self.released = self.stopped = self.stuck = False
        self._held: list[bytes] = []
        self._socket = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.linger, self._socket.rcvtimeo = 0, 20
        self.endpoint = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        self.start()

    def run(self) -> None:
        while not self.stopped:
            while self.released and self._held:
                self._answer(self._held.pop())
            with suppress(zmq.Again):
                client, _, payload = self._socket.recv_multipart()
                batch = pickle.loads(payload)
                first = batch[0] if isinstance(batch, list) else batch
                name = getattr(first, "prompt", type(first).__name__)
                self.got[name] += 1
                if name == "hold" or (self.stuck and not self.released):
                    self._held.append(client)
                else:
                    time.sleep(self.ms / 1e3)
                    self._answer(client)
        self._socket.close()

    def _answer(self, client: bytes) -> None:
        error = f"replica {self.index} cannot" if self.failing else None
        reply = sglang().OutputBatch(output=[self.index], error=error)
        self._socket.send_multipart([client, b"", pickle.dumps(reply)])


class Setup:
    """A client of several schedulers, whose ``forward`` is hooked."""

    def __init__(self, speeds: tuple[float, ...]) -> None:
        self.schedulers = [Scheduler(index, ms) for index, ms in enumerate(speeds)]
        endpoints = [scheduler.endpoint for scheduler in self.schedulers]
        log = {"requests": False, "requests_level": 0, "requests_format": "", "requests_target": []}
        server_args = {f"log_{name}": value for name, value in log.items()}
        server_args |= {"scheduler_endpoints": endpoints, "scheduler_rpc_timeout": None}
        self.client = sglang().Client()
        self.client.initialize(SimpleNamespace(**server_args))
        self.logged: list[tuple[str, object]] = []
        self.client.request_logger = SimpleNamespace(
            log_received_request=lambda batch: self.logged.append(("received", batch)),
            log_finished_request=lambda batch, _: self.logged.append(("finished", batch)),
        )
        self.replicas = replicas_of(self.client, len(endpoints))

    async def forward(self, batch, timeout_ms=None):
        return await forward(sglang().Client.forward, self.client, batch, timeout_ms)

    async def draw(self, *prompt, **fields) -> int:
        """The replica that has drawn it."""
        return (await self.forward([request(*prompt, **fields)])).output[0]

    async def hold(self, count: int, **fields) -> list[asyncio.Task]:
        """Requests that have arrived and are not answered."""
        due = count + self.held()
        tasks = [asyncio.create_task(self.draw("hold", **fields)) for _ in range(count)]
        await self.until(lambda: self.held() == due)
        return tasks

    def held(self) -> int:
        return sum(scheduler.got["hold"] for scheduler in self.schedulers)

    async def until(self, condition) -> None:
        while not condition():
            await asyncio.sleep(0.005)

    def close(self) -> None:
        for scheduler in self.schedulers:
            scheduler.stopped = True
            scheduler.join()
        self.client.context.destroy(linger=0)


def with_schedulers(*speeds: float):
    """A test, async, of a ``Setup`` whose schedulers take so many milliseconds a request."""

    def decorate(test):
        async def within_time(setup: Setup) -> None:
            async with asyncio.timeout(PATIENCE_S):
                await test(setup)
            assert not any(setup.replicas.outstanding)

        def run() -> None:
            setup = Setup(speeds)
            try:
                asyncio.run(within_time(setup))
            finally:
                setup.close()

        return run

    return decorate


@with_schedulers(0, 0)
async def test_small_requests_go_around_a_big_one(it):
    (big,) = await it.hold(1, **BIG)
    assert [await it.draw() for _ in range(10)] == [1] * 10
    it.schedulers[0].released = True
    assert await big == 0


@with_schedulers(0, 0)
async def test_a_crowd_of_small_requests_uses_the_big_ones_replica_too(it):
    """They overtake the big one there, which counts as one more of them; all on the other replica,
    they would wait for each other."""
    (big,) = await it.hold(1, **BIG)
    tasks = await it.hold(10)
    assert [it.replicas.outstanding[1] > 0, len(it.replicas.backlogs[0])] == [True, 5]
    for scheduler in it.schedulers:
        scheduler.released = True
    await asyncio.gather(big, *tasks)


@with_schedulers(0, 0, 0)
async def test_one_after_the_other_they_take_turns(it):
    assert [await it.draw() for _ in range(6)] == [0, 1, 2, 0, 1, 2]


@with_schedulers(0, 0)
async def test_a_slow_replica_gets_less(it):
    """Of six users who ask 60 times no more than half ever wait for the one that is stuck."""
    it.schedulers[1].stuck = True
    remaining = iter(range(60))
    used = Counter()

    async def user() -> None:
        for _ in remaining:
            used[await it.draw()] += 1

    users = [asyncio.create_task(user()) for _ in range(6)]
    await it.until(lambda: used[0] >= 57)
    assert it.schedulers[1].got.total() <= 3
    it.schedulers[1].released = True
    await asyncio.gather(*users)
    assert used.total() == 60


@with_schedulers(0, 0)
async def test_a_dead_replica_fails_only_its_own_and_gets_nothing_more(it):
    held = await it.hold(4)
    it.replicas.mark_dead(0)
    await it.until(lambda: sum(task.done() for task in held) == 2)
    failed, alive = ([t for t in held if t.done() is done] for done in (True, False))
    assert (len(failed), len(alive)) == (2, 2)
    for task in failed:
        with pytest.raises(ReplicaExited, match="replica 0 has exited; send the request again"):
            await task
    it.schedulers[1].released = True
    assert [await task for task in alive] == [1, 1]
    assert [await it.draw() for _ in range(4)] == [1] * 4
    it.replicas.mark_dead(1)
    with pytest.raises(ReplicaExited, match="all replicas have exited"):
        await it.draw()


@with_schedulers(0, 0)
async def test_work_is_released_however_a_forward_ends(it):
    (cancelled,) = await it.hold(1)
    assert it.replicas.outstanding[0] > 10
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert it.replicas.outstanding == [0, 0]
    with pytest.raises(TimeoutError):
        await it.forward([request("hold")], timeout_ms=20)
    held = await it.hold(3)
    it.client.mark_failed("the broker is gone")
    for task in held:
        with pytest.raises(RuntimeError, match="the broker is gone"):
            await task


@with_schedulers()
async def test_whatever_begins_and_ends_in_whatever_order_nothing_remains(it):
    replicas = Replicas(3)

    async def use(work: int) -> None:
        with suppress(ReplicaExited), replicas.forward(work):
            await asyncio.sleep(work % 7 / 1e4)

    works = [1, 30, 7, 1000, 12] * 40
    tasks = [asyncio.create_task(use(work)) for work in works]
    await asyncio.sleep(0)
    assert sum(replicas.outstanding) == sum(works)
    assert max(replicas.outstanding) - min(replicas.outstanding) <= max(works)
    replicas.mark_dead(2)
    await asyncio.gather(*tasks)
    assert replicas.outstanding == [0, 0, 0]


@with_schedulers()
async def test_a_cancelled_request_stays_cancelled_when_its_replica_dies(it):
    replicas = Replicas(1)

    async def use() -> None:
        with replicas.forward(5):
            await asyncio.Event().wait()

    task = asyncio.create_task(use())
    await asyncio.sleep(0)
    task.cancel()
    replicas.mark_dead(0)
    with pytest.raises(asyncio.CancelledError):
        await task


@with_schedulers()
async def test_after_its_replica_has_died_a_task_can_still_time_out(it):
    """Nothing of our cancel is left behind: asyncio.timeout would take it for somebody's."""
    replicas = Replicas(1)
    asyncio.get_running_loop().call_soon(replicas.mark_dead, 0)
    with pytest.raises(ReplicaExited), replicas.forward(5):
        await asyncio.sleep(PATIENCE_S)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await asyncio.sleep(PATIENCE_S)


@with_schedulers(0, 0, 0)
async def test_control_requests_reach_every_live_replica(it):
    control = sglang().scheduler_client.ListLorasReq()
    assert (await it.forward(control)).output == [0]
    it.schedulers[2].failing = True
    assert (await it.forward(control)).error == "replica 2 cannot"
    it.replicas.mark_dead(0)
    it.replicas.mark_dead(2)
    reply = await it.forward(control)
    assert (reply.output, reply.error) == ([1], None)
    assert [scheduler.got["ListLorasReq"] for scheduler in it.schedulers] == [2, 3, 2]
    it.replicas.mark_dead(1)
    with pytest.raises(ReplicaExited):
        await it.forward(control)


@with_schedulers(50, 50, 0)
async def test_a_control_request_is_finished_though_its_client_hangs_up_and_a_replica_dies(it):
    task = asyncio.create_task(it.forward(sglang().scheduler_client.ListLorasReq()))
    await it.until(lambda: it.schedulers[0].got)
    task.cancel()
    await it.until(lambda: it.schedulers[1].got)
    it.replicas.mark_dead(1)
    await it.until(lambda: it.schedulers[2].got and not any(it.replicas.outstanding))


@with_schedulers(0, 0, 0)
async def test_a_realtime_session_stays_on_its_replica(it):
    home = zlib.crc32(b"somebody") % 3
    batch = request()
    batch.realtime_session_id = "somebody"
    assert [(await it.forward([batch])).output for _ in range(4)] == [[home]] * 4
    it.replicas.mark_dead(home)
    with pytest.raises(ReplicaExited):
        await it.forward([batch])


@with_schedulers(0, 0)
async def test_requests_are_logged_as_sglang_does(it):
    batch, late = [request()], [request("hold")]
    await it.forward(batch)
    with pytest.raises(TimeoutError):
        await it.forward(late, timeout_ms=20)
    assert it.logged == [("received", batch), ("finished", batch), ("received", late)]


@pytest.mark.parametrize("endpoints", [["tcp://127.0.0.1:1"], None])
def test_one_replica_and_a_client_not_yet_started_are_left_to_sglang(endpoints):
    server_args = endpoints and SimpleNamespace(scheduler_endpoints=endpoints)
    client = SimpleNamespace(context=endpoints and object(), server_args=server_args)

    async def original(*arguments):
        return arguments

    assert asyncio.run(forward(original, client, "batch", 7)) == (client, "batch", 7)


def test_each_client_has_replicas_of_its_own():
    one, other = sglang().Client(), sglang().Client()
    assert replicas_of(one, 2) is replicas_of(one, 2)
    assert replicas_of(one, 2) is not replicas_of(other, 2)
    assert len(replicas_of(one, 3)) == 3


class Backend:
    """The HTTP server's app, with real processes as workers."""

    def __init__(self, workers: int, dp_size: int | None) -> None:
        self.processes = [subprocess.Popen(["sleep", "60"]) for _ in range(workers)]
        self.state = SimpleNamespace(
            worker_processes=[psutil.Process(process.pid) for process in self.processes],
            disagg_server=None,
            broker_task=None,
            server_args=SimpleNamespace(dp_size=dp_size),
        )

    def failure(self) -> str | None:
        return backend_failure(sglang().http_server._backend_failure, self)

    def __enter__(self) -> "Backend":
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def client(monkeypatch):
    client = sglang().Client()
    monkeypatch.setattr(sglang().scheduler_client, "async_scheduler_client", client)
    return client


def test_a_dead_worker_is_no_failure_while_another_lives(client, caplog):
    caplog.set_level(logging.WARNING)
    with Backend(workers=2, dp_size=2) as backend:
        assert backend.failure() is None
        assert replicas_of(client, 2).live == [0, 1]
        backend.processes[0].kill()
        while backend.state.worker_processes[0].status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert [backend.failure() for _ in range(3)] == [None] * 3
        assert replicas_of(client, 2).live == [1]
        assert caplog.messages == ["replica 0 has exited; 1 of 2 left"]
        backend.processes[0].wait()
        assert backend.failure() is None
        backend.processes[1].kill()
        backend.processes[1].wait()
        assert "Scheduler worker exited" in backend.failure()


def test_other_failures_stay_failures(client):
    with Backend(workers=2, dp_size=2) as backend:
        backend.state.broker_task = SimpleNamespace(done=lambda: True)
        assert "broker exited" in backend.failure()
        assert replicas_of(client, 2).live == [0, 1]
        backend.state.broker_task = SimpleNamespace(done=lambda: False)
        assert backend.failure() is None
        backend.state.disagg_server = SimpleNamespace(is_alive=False)
        assert "router exited" in backend.failure()


@pytest.mark.parametrize(("workers", "dp_size"), [(1, 1), (2, 1), (4, 2), (2, None)])
def test_a_dead_worker_of_the_only_or_of_a_split_replica_is_a_failure(client, workers, dp_size):
    with Backend(workers, dp_size) as backend:
        assert backend.failure() is None
        backend.processes[-1].kill()
        backend.processes[-1].wait()
        assert "Scheduler worker exited" in backend.failure()


def test_the_estimate_grows_with_the_work():
    base = estimated_ms(request())
    assert estimated_ms(request(num_outputs_per_prompt=4)) == pytest.approx(4 * base, rel=0.05)
    assert estimated_ms(request(num_inference_steps=16)) == pytest.approx(2 * base, rel=0.05)
    assert estimated_ms(request(guidance_scale=4.5)) == pytest.approx(2 * base, rel=0.05)
    assert estimated_ms(request(["small", "small"])) == pytest.approx(2 * base, rel=0.05)
    assert estimated_ms([request(), request()]) == 2 * base
    # 742 ms a step and lane is DESIGN.md's figure for 2048 x 2048.
    assert estimated_ms(request(**BIG)) == pytest.approx(2 * 52 * 742, rel=0.05)


STRANGE = [None, "big", -1, 0, 10**30, math.nan, math.inf, -math.inf, [4], True, 3.5]


@pytest.mark.parametrize("value", STRANGE, ids=repr)
def test_everything_has_an_estimate(value):
    for field in ("width", "height", "num_inference_steps", "num_outputs_per_prompt"):
        for other in ("guidance_scale", "prompt", "negative_prompt"):
            batch = request()
            setattr(batch.sampling_params, field, value)
            setattr(batch.sampling_params, other, value)
            assert 1 <= estimated_ms([batch]) < 10**12
    batch.sampling_params = None
    messages = [batch, {"method": "ping"}, sglang().scheduler_client.ShutdownReq(), value]
    assert [estimated_ms(message) for message in messages] == [1] * 4
