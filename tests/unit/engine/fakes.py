"""A model of a device: the same contract as a model runner's, on a clock that only work moves.

It checks what it is told as strictly as it can. The engine catches what an executor raises, so a
breach of the contract is also kept in `violations`, which `Harness` looks at after every call.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, NamedTuple

from krea2_srt.engine.config import EngineConfig
from krea2_srt.engine.cost import CostModel, roofline
from krea2_srt.engine.engine import Engine
from krea2_srt.engine.events import Ended, Event
from krea2_srt.engine.lifecycle import Request, Sequence, State
from krea2_srt.engine.work import PackStep, StepResult
from krea2_srt.errors import OutOfMemoryError, QueueFullError
from krea2_srt.request import ImageRequest
from krea2_srt.testing.fake_executor import FakeExecutor, VirtualClock

H200 = roofline()

MAX_TURNS = 100_000
"""More than any test needs."""


class ContractViolation(AssertionError):
    """The engine asked for something that no executor could do."""


class DeviceError(Exception):
    """A foreign failure, as from CUDA."""


class Ran(NamedTuple):
    """A unit of work that the fake was asked for; times in seconds."""

    kind: str
    sequences: tuple[Sequence, ...]
    blocks: range
    start: float
    end: float
    failed: bool
    num_steps: int = 1

    @property
    def ms(self) -> float:
        return (self.end - self.start) * 1e3

    @property
    def requests(self) -> list[str]:
        return list(dict.fromkeys(sequence.request.id for sequence in self.sequences))


@dataclass(eq=False)
class StrictExecutor(FakeExecutor):
    """A `FakeExecutor` that checks everything, and fails as it is told.

    Attributes:
        overlaps_decodes: decodes take no time of the device; `decode` returns True when enough time
            has passed since it was first called.
        full_schedule_graphs: lone sequences may do all their steps at once.
        decode_slices: calls of `decode` that a sequence takes, where they are not overlapped.
        text_tokens: true length of every prompt; None keeps the estimates.
        slowdown: how many times as long as the cost model says everything takes.
        memory_tokens: most tokens of a forward and of the paused steps beside it.
        max_active_sequences: no further request may be encoded once so many have begun; None is
            any number.
        poisoned: any forward with one of these raises.
        non_finite: these come back as no longer finite.
        reports_late: what became of a step is told by the next call only, as by a GPU that the host
            does not wait for.
        unencodable: encoding one of these raises.
        undecodable: decoding one of these raises.
        ran: all work in order.
        begun: sequences whose first step has started and that are not released: those with latents.
        released: those that are.
    """

    cost: CostModel
    decode_slices: int = 1
    text_tokens: int | None = None
    slowdown: float = 1.0
    memory_tokens: int | None = None
    max_active_sequences: int | None = None
    poisoned: set[Sequence] = field(default_factory=set)
    non_finite: set[Sequence] = field(default_factory=set)
    reports_late: bool = False
    unencodable: set[Request] = field(default_factory=set)
    undecodable: set[Sequence] = field(default_factory=set)
    ran: list[Ran] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    begun: set[Sequence] = field(default_factory=set)
    released: set[Sequence] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._steps_done: dict[Sequence, int] = {}
        self._slices: dict[PackStep, int] = {}
        self._failed_step: PackStep | None = None
        self._void: set[PackStep] = set()
        self._decodes: dict[Sequence, float] = {}
        self._decoded: set[Sequence] = set()
        self._tried: set[Request] = set()
        self._results: list[StepResult] = []

    @property
    def paused(self) -> list[PackStep]:
        return list(self._slices)

    @property
    def empty(self) -> bool:
        return not (
            self._steps_done
            or self._slices
            or self._decodes
            or self._decoded
            or self.begun
            or self._results
        )

    @property
    def next_decode(self) -> float | None:
        """When the first overlapped decode is ready."""
        return min(self._decodes.values(), default=None) if self.overlaps_decodes else None

    def encode(self, requests: Collection[Request]) -> None:
        self._require(len(requests) > 0, "encode of nothing")
        self._require(len(set(requests)) == len(requests), "encode of a request twice")
        sequences = tuple(s for request in requests for s in request.sequences)
        for sequence in sequences:
            self._require(sequence.state is State.ENCODING, "encode in another state", sequence)
            self._require(sequence not in self._steps_done, "encoded already", sequence)
            self._require(sequence not in self.released, "encode after release", sequence)
        if not self._tried.issuperset(requests) and self.max_active_sequences is not None:
            room = len(self.begun) < self.max_active_sequences
            self._require(room, "encode of another request beside too many", sequences[0])
        there = [request for request in self._tried if not request.ended]
        digests = {digest for request in [*there, *requests] for digest in request.adapters}
        self._require(self.adapters_fit(digests), "encode beside too many adapters", sequences[0])
        self._tried.update(requests)
        branches = {
            prompt: self._lane(tokens - sequence.image.image_tokens)
            for sequence in sequences
            for prompt, tokens in zip(sequence.image.prompts, sequence.tokens, strict=True)
        }
        fails = any(request in self.unencodable for request in requests)
        with self._running("encode", sequences, self.cost.encode(sum(branches.values())), fails):
            self._allocate(sum(branches.values()))
        for sequence in sequences:
            self._steps_done[sequence] = 0
            sequence.tokens = tuple(
                branches[prompt] + sequence.image.image_tokens for prompt in sequence.image.prompts
            )

    def step(self, step: PackStep, blocks: range) -> Collection[StepResult]:
        self._require(len(step.sequences) > 0, "step of nothing")
        self._require(len(set(step.sequences)) == len(step.sequences), "sequence twice in a pack")
        self._require(step not in self._void, "step after it was dropped or done")
        for sequence in step.sequences:
            self._require(sequence not in self.released, "step after release", sequence)
            self._require(sequence in self._steps_done, "step before encode", sequence)
            self._require(sequence.state is State.DENOISING, "step in another state", sequence)
            done = self._steps_done[sequence]
            self._require(sequence.step == done < sequence.image.steps, "wrong step", sequence)
            whole = (len(step.sequences), done, step.steps) == (1, 0, sequence.image.steps)
            self._require(step.steps == 1 or whole, "some steps at once", sequence)
            self._require(
                step.steps == 1 or (self.full_schedule_graphs and not sequence.wants_previews),
                "steps at once of a sequence that wants them one by one",
                sequence,
            )
            for other in self._slices:
                self._require(
                    other is step or sequence not in other.sequences, "in two packs", sequence
                )
        self._require(step.total_blocks == self.cost.blocks, "another model's blocks")
        self._require(blocks.step == 1 and len(blocks) > 0, f"odd slice {blocks}")
        self._require(blocks.start == self._slices.get(step, 0), f"{blocks} is not next")
        self._require(blocks.stop <= step.total_blocks, f"{blocks} does not exist")

        branches = [tokens for sequence in step.sequences for tokens in sequence.tokens]
        ms = self.cost.step(branches) * step.steps * len(blocks) / step.total_blocks
        fails = any(sequence in self.poisoned for sequence in step.sequences)
        self.begun.update(step.sequences)
        self._failed_step = step
        with self._running("step", step.sequences, ms, fails, blocks, step.steps):
            self._allocate(step.tokens, step)
        self._failed_step = None
        if blocks.stop < step.total_blocks:
            self._slices[step] = blocks.stop
            return self._report(StepResult(step, blocks))
        self._slices.pop(step, None)
        self._void.add(step)
        for sequence in step.sequences:
            self._steps_done[sequence] += step.steps
            sequence.step += step.steps
        non_finite = tuple(s for s in step.sequences if s in self.non_finite)
        return self._report(StepResult(step, blocks, non_finite))

    def settle(self, sequence: Sequence | None = None) -> Collection[StepResult]:
        count = len(self._results)
        if sequence is not None:  # those up to its last one
            while count and sequence not in self._results[count - 1].step.sequences:
                count -= 1
        return self._take_results(count)

    def drop_step(self, step: PackStep) -> None:
        known = step in self._slices or step is self._failed_step
        self._require(known, "drop of a step that is not there")
        self._require(step not in self._void, "drop of a step that is done")
        self._slices.pop(step, None)
        self._void.add(step)

    def decode(self, sequence: Sequence) -> bool:
        self._require(sequence not in self.released, "decode after release", sequence)
        self._require(sequence.state is State.DECODING, "decode in another state", sequence)
        self._require(sequence not in self._decoded, "decode after the last slice", sequence)
        done = self._steps_done.get(sequence)
        self._require(done == sequence.image.steps, "decode of an unfinished sequence", sequence)
        ms = self.cost.decode(sequence.image.width * sequence.image.height)
        fails = sequence in self.undecodable
        if self.overlaps_decodes:
            ready = self._decodes.setdefault(sequence, self.clock.now + ms / 1e3)
            if fails:
                del self._decodes[sequence]
                raise DeviceError("decode")
            finished = ready <= self.clock.now
        else:
            with self._running("decode", (sequence,), ms / self.decode_slices, fails):
                self._allocate(sequence.image.image_tokens)
            self._decodes[sequence] = self._decodes.get(sequence, 0) + 1
            finished = self._decodes[sequence] == self.decode_slices
        if finished:
            del self._decodes[sequence]
            self._decoded.add(sequence)
        return finished

    def release(self, sequence: Sequence) -> None:
        self._require(sequence.state.ended, "release of what has not ended", sequence)
        self._require(sequence not in self.released, "release twice", sequence)
        for step in self._slices:
            self._require(sequence not in step.sequences, "release within a paused step", sequence)
        if sequence.state is State.DONE:
            unknown = any(sequence in result.step.sequences for result in self._results)
            self._require(not unknown, "done before it is known what became of it", sequence)
            self._require(sequence not in self.non_finite, "done and not finite", sequence)
        self.released.add(sequence)
        self.begun.discard(sequence)
        self._steps_done.pop(sequence, None)
        self._decodes.pop(sequence, None)
        self._decoded.discard(sequence)

    def _report(self, result: StepResult) -> Collection[StepResult]:
        """What a step returns: its own result, or those before it."""
        if not self.reports_late:
            return [result]
        told = self._take_results(len(self._results))
        self._results.append(replace(result, ms=self.ran[-1].ms))
        return told

    def _take_results(self, count: int) -> list[StepResult]:
        taken, self._results = self._results[:count], self._results[count:]
        return taken

    def _lane(self, estimate: int) -> int:
        return estimate if self.text_tokens is None else self.text_tokens

    def _allocate(self, tokens: int, own: PackStep | None = None) -> None:
        paused = sum(step.tokens for step in self._slices if step is not own)
        if self.memory_tokens is not None and tokens + paused > self.memory_tokens:
            raise OutOfMemoryError(f"{tokens} tokens and {paused} paused > {self.memory_tokens}")

    def _running(
        self,
        kind: str,
        sequences: tuple[Sequence, ...],
        ms: float,
        fails: bool,
        blocks: range = range(0),
        num_steps: int = 1,
    ) -> "_Running":
        return _Running(self, kind, sequences, blocks, ms * self.slowdown, fails, num_steps)

    def _require(self, holds: bool, what: str, sequence: Sequence | None = None) -> None:
        if not holds:
            where = f": {sequence.request.id}/{sequence.index}" if sequence else ""
            self.violations.append(what + where)
            raise ContractViolation(what + where)


@dataclass
class _Running:
    """Lets time pass and records the work, also when it fails."""

    executor: StrictExecutor
    kind: str
    sequences: tuple[Sequence, ...]
    blocks: range
    ms: float
    fails: bool
    num_steps: int

    def __enter__(self) -> None:
        self.start = self.executor.clock.now
        self.executor.spend(self.ms)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        failed = self.fails or kind is not None
        end = self.executor.clock.now
        self.executor.ran.append(
            Ran(self.kind, self.sequences, self.blocks, self.start, end, failed, self.num_steps)
        )
        if self.fails and kind is None:
            raise DeviceError(self.kind)


def image(size: int | tuple[int, int] = 256, steps: int = 8, **fields: Any) -> ImageRequest:
    """An image of a size in pixels; its prompt is about 64 tokens long."""
    width, height = (size, size) if isinstance(size, int) else size
    fields = {"prompt": "a" * 236} | fields
    return ImageRequest(width=width, height=height, steps=steps, **fields)


class Arrival(NamedTuple):
    """A request to come: seconds, and the arguments of `Harness.submit`."""

    time: float
    arguments: dict[str, Any]


class Harness:
    """An engine on a fake device, whose every call is checked.

    Args:
        config: of the engine.
        cost: what the engine expects work to take.
        true_cost: what it takes; by default as expected.
        fake: further arguments of the `StrictExecutor`.

    Attributes:
        events: all there were.
        ended: requests that ended, by id.
        ended_at: when, in seconds.
        all: every request that was taken.
        refused: arrivals for which the queue was full.
    """

    def __init__(
        self,
        config: EngineConfig | None = None,
        cost: CostModel = H200,
        true_cost: CostModel | None = None,
        **fake: Any,
    ) -> None:
        self.clock = VirtualClock()
        config = config or EngineConfig()
        fake = {"max_active_sequences": config.max_active_sequences} | fake
        self.executor = StrictExecutor(self.clock, true_cost or cost, **fake)
        self.engine = Engine(self.executor, cost, config, self.clock)
        self.events: list[Event] = []
        self.ended: dict[str, Request] = {}
        self.ended_at: dict[str, float] = {}
        self.all: list[Request] = []
        self.refused = 0

    @property
    def scheduler(self) -> Any:
        return self.engine._scheduler

    @property
    def ran(self) -> list[Ran]:
        return self.executor.ran

    def steps(self, request: Request | None = None) -> list[Ran]:
        """Steps and slices that ran, of one request or of all."""
        return [
            r for r in self.ran if r.kind == "step" and (not request or request.id in r.requests)
        ]

    def submit(
        self,
        size: int | tuple[int, int] = 256,
        steps: int = 8,
        *,
        request_id: str | None = None,
        images: list[ImageRequest] | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
        **fields: Any,
    ) -> Request:
        images = images or [image(size, steps, **fields)]
        request_id = request_id or f"r{len(self.all)}"
        request = self.engine.submit(request_id, images, priority, deadline_s)
        self.all.append(request)
        return request

    def cancel(self, request: Request) -> None:
        self._take(self.engine.cancel(request.id))

    def turn(self) -> bool:
        """One turn; returns whether there was anything to do."""
        events = self.engine.turn()
        self._take(events or [])
        assert self.scheduler.num_active_sequences == len(self.executor.begun)
        return events is not None

    def turns(self, number: int) -> None:
        for _ in range(number):
            self.turn()

    def run(self, arrivals: Iterable[Arrival] = (), until: float = float("inf")) -> None:
        """Take requests in as they come, and turn until nothing is left, or until a time."""
        coming = sorted(arrivals, key=lambda arrival: arrival.time)[::-1]
        turns = count()
        while self.clock.now < until:
            assert next(turns) < MAX_TURNS, "the engine turns for ever"
            while coming and coming[-1].time <= self.clock.now:
                try:
                    self.submit(**coming.pop().arguments)
                except QueueFullError:
                    self.refused += 1
            if self.turn():
                continue
            wake = [coming[-1].time] if coming else []
            if self.executor.next_decode is not None:
                wake.append(self.executor.next_decode)
            if not wake:
                assert self.engine.idle, "nothing to do, and yet requests in the engine"
                return
            self.clock.now = max(self.clock.now, min(wake))

    def run_until(self, request: Request) -> None:
        """Turn until a request has ended."""
        turns = count()
        while not request.ended:
            assert next(turns) < MAX_TURNS, "the engine turns for ever"
            assert self.turn(), f"{request.id} never ends"

    def latency(self, request: Request) -> float:
        return self.ended_at[request.id] - request.arrival

    def check_empty(self) -> None:
        """Nothing is left anywhere of requests that have all ended."""
        statistics = self.engine.statistics()
        assert self.engine.idle
        assert not self.engine.has_overlapped_decodes
        assert self.executor.empty
        left = ("requests", "waiting", "active_sequences", "paused_steps", "outstanding_s")
        assert {name: statistics[name] for name in left} == dict.fromkeys(left, 0)
        assert sorted(self.ended) == sorted(request.id for request in self.all)
        assert all(s.state.ended for request in self.all for s in request.sequences)
        assert self.executor.released == {s for request in self.all for s in request.sequences}

    def _take(self, events: list[Event]) -> None:
        assert not self.executor.violations
        self.events += events
        for event in events:
            if isinstance(event, Ended):
                assert event.request.id not in self.ended, "ended twice"
                self.ended[event.request.id] = event.request
                self.ended_at[event.request.id] = self.clock.now
