"""A replica: the engine itself, on a device that only spends time."""

from collections.abc import Iterator
from dataclasses import dataclass

from krea2_bench.simulation.traces import Job
from krea2_srt.engine.config import EngineConfig
from krea2_srt.engine.cost import CostModel
from krea2_srt.engine.engine import Engine
from krea2_srt.engine.events import Ended
from krea2_srt.engine.lifecycle import Request
from krea2_srt.testing.fake_executor import FakeExecutor, VirtualClock


@dataclass(frozen=True)
class Taken:
    """A request as it was when a replica took it.

    Attributes:
        key: its place in the policy's order.
        total_ms: estimated work.
    """

    key: float
    total_ms: float


class Replica:
    """One engine. What arrives while a turn runs is taken in when the turn is over.

    Args:
        config: of the engine.
        cost: of work on its device.
        host_ms: added to every unit of work.
    """

    def __init__(self, config: EngineConfig, cost: CostModel, host_ms: float) -> None:
        self.clock = VirtualClock()
        self.executor = FakeExecutor(
            self.clock, cost, host_ms=host_ms, decode_slice_ms=config.max_turn_ms
        )
        self.engine = Engine(self.executor, cost, config, self.clock)
        self.taken: dict[str, Taken] = {}
        """What is in it, by id."""

    def submit(
        self, request_id: str, job: Job, time_s: float, limit_s: float | None = None
    ) -> None:
        """Take a job in that arrived at a time up to which the replica has been advanced.

        Args:
            request_id: unique in the replica.
            job: what to do.
            time_s: its arrival.
            limit_s: seconds after its arrival at which the engine gives it up.
        """
        clock = self.clock
        clock.now = max(clock.now, time_s)
        if limit_s is not None:
            limit_s = max(0.0, limit_s - (clock.now - time_s))
        request = self.engine.submit(request_id, [job.request], deadline_s=limit_s)
        self.taken[request_id] = Taken(request.key, request.remaining_ms)

    def advance(self, time_s: float) -> Iterator[Request]:
        """Begin all turns that begin before a time; yields requests as they end."""
        while self.clock.now < time_s and not self.engine.idle:
            events = self.engine.turn()
            if events is None:
                raise RuntimeError("the engine holds requests but finds no work")
            for event in events:
                if isinstance(event, Ended):
                    del self.taken[event.request.id]
                    yield event.request

    def turn_ms(self, time_s: float) -> float:
        """What is left of its turn at a time up to which it has been advanced."""
        return max(0.0, self.clock.now - time_s) * 1e3
