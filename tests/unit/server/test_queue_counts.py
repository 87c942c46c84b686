"""What is said of the queue by engines that answer, that are busy, and that have gone."""

import asyncio

from krea2_server.engine.base import QueueCounts
from krea2_server.engine.channel import EngineExitedError
from krea2_server.engine.client import READY_SILENCE_S, EngineClient


class Channel:
    """A channel to an engine that says one thing, or nothing."""

    def __init__(self, says):
        self._says = says

    async def statistics(self, timeout_s):
        if isinstance(self._says, Exception):
            raise self._says
        return self._says

    def close(self, reason=""):
        pass


def counts(waiting, running, seconds):
    return {"requests": waiting + running, "waiting": waiting, "outstanding_s": seconds}


async def client_of(*says):
    client = EngineClient(len(says))
    for index, each in enumerate(says):
        replica = client.replicas[index]
        replica.channel, replica.answered = Channel(each), asyncio.get_running_loop().time()
        client.routing.mark_live(index)
    return client


def queue(prepare, *says):
    async def check():
        client = await client_of(*says)
        prepare(client)
        try:
            return await client.queue()
        finally:
            client.close()

    return asyncio.run(check())


def test_every_engine_is_asked():
    found = queue(lambda client: None, counts(2, 1, 3.0), counts(0, 4, 5.0))
    assert found == [QueueCounts(2, 1, 3.0), QueueCounts(0, 4, 5.0)]


def test_a_busy_engine_has_what_was_sent_to_it():
    def send_three(client):
        client.replicas[0].statistics = counts(0, 0, 0.0)
        for work in (10, 20, 30):
            client.routing.loads[0].add(work)

    assert queue(send_three, TimeoutError()) == [QueueCounts(2, 1, 0.0)]


def test_what_a_busy_engine_said_of_others_requests_is_kept():
    def send_one(client):
        client.replicas[0].statistics = counts(5, 2, 9.0)
        client.routing.loads[0].add(10)

    assert queue(send_one, TimeoutError()) == [QueueCounts(5, 2, 9.0)]


def test_an_engine_that_restarts_or_has_hung_is_not_counted():
    def lose_two(client):
        client.detach(0)
        client.replicas[1].answered -= 2 * READY_SILENCE_S

    found = queue(lose_two, counts(9, 9, 9.0), counts(9, 9, 9.0), counts(1, 0, 2.5))
    assert found == [QueueCounts(1, 0, 2.5)]


def test_an_engine_that_goes_while_it_is_asked_takes_its_requests_along():
    assert queue(lambda client: None, EngineExitedError("gone")) == []
