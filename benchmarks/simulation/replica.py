"""A replica: the engine itself, with an executor that spends time on a virtual clock."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from math import ceil

from benchmarks.simulation.traces import Job
from krea2_srt.engine.config import EngineConfig
from krea2_srt.engine.cost import CostModel
from krea2_srt.engine.engine import Engine
from krea2_srt.engine.events import Ended
from krea2_srt.engine.lifecycle import Request, Sequence
from krea2_srt.engine.work import PackStep, StepResult


@dataclass
class VirtualClock:
    """Seconds that pass when somebody says so."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class CostExecutor:
    """Runs nothing; advances a clock by what the cost model says.

    Attributes:
        clock: of the replica.
        cost: of work on the device.
        host_ms: added to every unit of work.
        slice_ms: longest slice of a decode.
    """

    clock: VirtualClock
    cost: CostModel
    host_ms: float
    slice_ms: float
    decodes_aside: bool = False
    whole_schedules: bool = False
    _slices: dict[Sequence, int] = field(default_factory=dict)

    def encode(self, requests: Collection[Request]) -> None:
        tokens = 0
        for request in requests:
            first = request.sequences[0]
            tokens += sum(first.tokens) - len(first.tokens) * first.image.image_tokens
        self._spend(self.cost.encode(tokens))

    def step(self, step: PackStep, blocks: range) -> Collection[StepResult]:
        ms = self.cost.step(lane for sequence in step.sequences for lane in sequence.tokens)
        self._spend(ms * len(blocks) / step.total_blocks)
        return [StepResult(step, blocks)]

    def settle(self, sequence: Sequence | None = None) -> Collection[StepResult]:
        return ()

    def drop_step(self, step: PackStep) -> None:
        """Nothing is held."""

    def decode(self, sequence: Sequence) -> bool:
        ms = self.cost.decode(sequence.image.width * sequence.image.height)
        total = ceil(ms / self.slice_ms)
        self._spend(ms / total)
        done = self._slices.pop(sequence, 0) + 1
        if done < total:
            self._slices[sequence] = done
        return done == total

    def release(self, sequence: Sequence) -> None:
        self._slices.pop(sequence, None)

    def _spend(self, ms: float) -> None:
        self.clock.now += (ms + self.host_ms) / 1e3


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
        self.executor = CostExecutor(self.clock, cost, host_ms, config.max_turn_ms)
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
