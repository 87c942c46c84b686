"""Sends a plan to an endpoint: as the clock says, or as fast as answers come."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence

from krea2_bench.load.endpoint import Endpoint
from krea2_bench.load.outcome import Outcome
from krea2_bench.load.plan import Planned

OnOutcome = Callable[[Outcome], None]


class Generator:
    """Sends requests until they are through or somebody stops it.

    Args:
        endpoint: where to.
        on_outcome: told of each request as it ends.
    """

    def __init__(self, endpoint: Endpoint, on_outcome: OnOutcome) -> None:
        self.stopped = False
        self._endpoint = endpoint
        self._on_outcome = on_outcome
        self._tasks: set[asyncio.Task[None]] = set()
        self._origin = 0.0

    @property
    def in_flight(self) -> int:
        return len(self._tasks)

    def stop(self) -> None:
        """Send nothing more, and hang up on what is under way."""
        self.stopped = True
        for task in self._tasks:
            task.cancel()

    async def run(self, plan: Sequence[Planned], concurrency: int | None = None) -> None:
        """Send all of a plan and wait for the ends.

        Args:
            plan: whose requests have times, unless ``concurrency`` is given.
            concurrency: how many clients send one request after the other (closed loop); None
                sends each when it is due, however many are under way (open loop).
        """
        self._origin = time.perf_counter()
        if concurrency is None:
            await self._play_open(plan)
        else:
            waiting = iter(plan)
            clients = [self._client(waiting) for _ in range(min(concurrency, len(plan)))]
            self._tasks = {asyncio.create_task(client) for client in clients}
        while self._tasks:
            done, self._tasks = await asyncio.wait(self._tasks)
            for task in done:
                if not task.cancelled():
                    task.result()  # a bug of ours must not pass for an idle server

    async def _play_open(self, plan: Sequence[Planned]) -> None:
        for planned in plan:
            assert planned.due_s is not None
            while (wait_s := self._origin + planned.due_s - time.perf_counter()) > 0:
                if self.stopped:
                    return
                await asyncio.sleep(min(wait_s, 0.1))
            if self.stopped:
                return
            task = asyncio.create_task(self._send(planned, planned.due_s))
            self._tasks.add(task)
            task.add_done_callback(self._forget)

    async def _client(self, waiting: Iterator[Planned]) -> None:
        for planned in waiting:
            if self.stopped:
                return
            await self._send(planned, time.perf_counter() - self._origin)

    async def _send(self, planned: Planned, due_s: float) -> None:
        self._on_outcome(await self._endpoint.generate(planned, self._origin, due_s))

    def _forget(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is None:
            self._tasks.discard(task)
