"""The engine: takes requests in, and runs one unit of work per turn."""

import logging
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

from krea2_srt.engine.admission import Admission
from krea2_srt.engine.config import EngineConfig
from krea2_srt.engine.cost import CostModel
from krea2_srt.engine.deadlines import Deadlines
from krea2_srt.engine.events import Ended, Event, Progress, Started
from krea2_srt.engine.lifecycle import Request, State
from krea2_srt.engine.lifecycle import Sequence as ImageSequence
from krea2_srt.engine.online_calibration import OnlineCalibration
from krea2_srt.engine.policy import POLICIES
from krea2_srt.engine.request_table import RequestTable
from krea2_srt.engine.statistics import Counters
from krea2_srt.engine.step_scheduler import StepScheduler
from krea2_srt.engine.turn_log import TurnLog
from krea2_srt.engine.work import Decode, Encode, Executor, PackStep, StepResult, Work
from krea2_srt.errors import (
    DeadlineError,
    Krea2Error,
    OutOfMemoryError,
    RequestError,
    first_line,
    foreign,
    not_finite,
)
from krea2_srt.request import ImageRequest, check_number

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_PRIORITY = 10
MAX_DEADLINE_S = 24 * 3600.0


class Engine:
    """Requests in, pictures out, a turn at a time. Not thread-safe.

    Args:
        executor: runs the work.
        cost: estimates of its time.
        config: limits and policy.
        clock: seconds; only differences count.
        turn_log: told of every unit of work.
    """

    def __init__(
        self,
        executor: Executor,
        cost: CostModel,
        config: EngineConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
        turn_log: TurnLog | None = None,
    ) -> None:
        self.config = config or EngineConfig()
        self.cost = cost
        self.counters = Counters()
        self._executor = executor
        self._clock = clock
        self._turn_log = turn_log
        self._table = RequestTable(cost, POLICIES[self.config.policy])
        self._admission = Admission(self.config.max_queue_s)
        self._scheduler = StepScheduler(
            self.config,
            cost,
            executor.overlaps_decodes,
            executor.full_schedule_graphs,
            executor.adapters_fit,
        )
        self._calibration = OnlineCalibration()
        self._decoding: dict[ImageSequence, None] = {}
        self._deadlines = Deadlines()

    # What the outside asks for.

    def submit(
        self,
        request_id: str,
        images: Sequence[ImageRequest],
        priority: int = 0,
        deadline_s: float | None = None,
    ) -> Request:
        """Take a request in.

        Args:
            request_id: not that of a request in the engine.
            images: one or more; a request for n images counts as n of them.
            priority: see `policy`.
            deadline_s: seconds from now after which it fails.

        Raises:
            RequestError: it is not possible; names the field.
            QueueFullError: there is too much work in the engine.
            DrainingError: nothing is taken any more.
        """
        try:
            return self._submit(request_id, images, priority, deadline_s)
        except Krea2Error:
            self.counters.refused += 1
            raise

    def cancel(self, request_id: str) -> list[Event]:
        """End a request before its next unit of work; one that is not here is no error."""
        request = self.requests.get(request_id)
        if request is None:
            return []
        return [self._end(request, State.CANCELLED)]

    def drain(self) -> None:
        """Take no more requests; those in the engine finish."""
        self._admission.draining = True

    @property
    def requests(self) -> dict[str, Request]:
        """Those in the engine, by id."""
        return self._table.requests

    @property
    def outstanding_ms(self) -> float:
        """Estimated work of all of them."""
        return self._table.outstanding_ms

    @property
    def draining(self) -> bool:
        return self._admission.draining

    @property
    def idle(self) -> bool:
        """Whether no request is in the engine."""
        return not self.requests

    @property
    def has_overlapped_decodes(self) -> bool:
        """Whether decodes run that the next turn should look after."""
        return bool(self._decoding)

    def statistics(self) -> dict[str, Any]:
        """Counters, and what is in the engine now."""
        scheduler = self._scheduler
        return {
            **self.counters.as_dict(),
            "policy": self.config.policy,
            "draining": self.draining,
            "requests": len(self.requests),
            "waiting": scheduler.num_waiting,
            "running": len(self.requests) - scheduler.num_waiting,
            "active_sequences": scheduler.num_active_sequences,
            "paused_steps": len(scheduler.paused),
            "pack_tokens_budget": scheduler.budget.tokens,
            "outstanding_s": self.outstanding_ms / 1e3,
        }

    # The turn.

    def turn(self) -> list[Event] | None:
        """Pick a unit of work, run it, and handle what came of it.

        Returns:
            What happened, or None if there was nothing to do.
        """
        events = self.expire()
        if self._decoding:
            events += self._collect_decodes()
        if events:
            return events  # whoever waits for them should not wait for other work too
        work = self._scheduler.pick()
        if work is None:
            return self._settle() or None
        entry = None if self._turn_log is None else self._turn_log.entry(work)
        start = self._clock()
        events = self._run(work)
        seconds = self._clock() - start
        self._count_turn(work, seconds)
        if self._turn_log is not None and entry is not None:
            self._turn_log.ran(entry, seconds)
        return events

    def _run(self, work: Work) -> list[Event]:
        match work:
            case Encode():
                return self._encode(work)
            case PackStep():
                return self._step(work)
            case Decode():
                return self._decode(work.sequence)

    def _encode(self, work: Encode) -> list[Event]:
        events: list[Event] = []
        for request in work.requests:
            if request.state is State.WAITING:
                self._scheduler.activate(request)
                self._move(request, State.ENCODING)
                events.append(Started(request))
        try:
            self._executor.encode(work.requests)
        except Exception as error:
            self._log_failure("encode", error)
            if isinstance(error, OutOfMemoryError) and self._memory_may_free():
                return events
            if len(work.requests) == 1:
                events.append(self._end(work.requests[0], State.FAILED, foreign(error)))
            # Several are still encoding: each is tried alone in turns to come.
            return events
        for request in work.requests:
            self._move(request, State.DENOISING)
            self._table.update(request)
        self._scheduler.budget.succeeded()
        return events

    def _step(self, step: PackStep) -> list[Event]:
        blocks = step.next_blocks
        paused = self._scheduler.paused
        self._scheduler.begin(step.sequences)
        start = self._clock()
        try:
            results = self._executor.step(step, blocks)
        except Exception as error:
            return self._step_failed(step, error)
        self._keep_pace(results, (self._clock() - start) * 1e3)
        step.blocks_done = blocks.stop
        if not step.done:
            if step not in paused:
                paused.append(step)
            return self._fail_non_finite(results)
        if step in paused:
            paused.remove(step)
        self._scheduler.budget.succeeded()
        self.counters.packs += 1
        self.counters.tokens += step.tokens * step.steps
        events: list[Event] = []
        for sequence in step.sequences:
            self._scheduler.stepped(sequence)
            self.counters.steps += step.steps
            events.append(Progress(sequence))
            if sequence.step == sequence.image.steps:
                sequence.move(State.DECODING)
                sequence.request.reached[State.DECODING] = self._clock()
                if self._executor.overlaps_decodes:
                    self._decoding[sequence] = None
        for request in dict.fromkeys(sequence.request for sequence in step.sequences):
            self._table.update(request)
        return events + self._fail_non_finite(results)

    def _settle(self, sequence: ImageSequence | None = None) -> list[Event]:
        """Wait for what became of steps, of all or of one sequence, and handle it."""
        results = self._executor.settle(sequence)
        self._keep_pace(results)
        return self._fail_non_finite(results)

    def _fail_non_finite(self, results: Collection[StepResult]) -> list[Event]:
        """End requests by steps whose outcome is known now; they may be further on, or ended."""
        events: list[Event] = []
        for sequence in (sequence for result in results for sequence in result.non_finite):
            if not sequence.request.ended:
                reason = not_finite("the latents")
                events.append(self._end(sequence.request, State.FAILED, reason))
        return events

    def _step_failed(self, step: PackStep, error: Exception) -> list[Event]:
        self._log_failure("step", error)
        self._drop(step)
        if isinstance(error, OutOfMemoryError):
            self._scheduler.budget.out_of_memory(step.tokens)
            if self._memory_may_free():
                return []
        if len(step.sequences) > 1:
            self.counters.retried += len(step.sequences)
            if not isinstance(error, OutOfMemoryError):  # for which the budget is smaller now
                self._scheduler.isolate(step.sequences)
            return []
        return [self._end(step.sequences[0].request, State.FAILED, foreign(error))]

    def _decode(self, sequence: ImageSequence) -> list[Event]:
        try:
            finished = self._executor.decode(sequence)
            sequence.decode_begun = True
        except Exception as error:
            self._log_failure("decode", error)
            if isinstance(error, OutOfMemoryError) and not sequence.decode_retried:
                sequence.decode_retried = True
                if self._memory_may_free():
                    return []
            return [self._end(sequence.request, State.FAILED, foreign(error))]
        if not finished:
            return []
        events = self._settle(sequence)
        if sequence.state.ended:
            return events  # its last step is known only now, and has failed it
        self._decoding.pop(sequence, None)
        sequence.move(State.DONE)
        self._release(sequence)
        self.counters.sequences_done += 1
        request = sequence.request
        self._table.update(request)
        if all(s.state is State.DONE for s in request.sequences):
            events.append(self._end(request, State.DONE))
        return events

    def _collect_decodes(self) -> list[Event]:
        events: list[Event] = []
        for sequence in sorted(self._decoding, key=lambda sequence: sequence.request.key):
            if sequence in self._decoding:  # a sibling's failure may have ended it just now
                events += self._decode(sequence)
        return events

    # Bookkeeping.

    def _submit(
        self,
        request_id: str,
        images: Sequence[ImageRequest],
        priority: int,
        deadline_s: float | None,
    ) -> Request:
        if request_id in self.requests:
            raise RequestError("request_id", f"{request_id!r} is in the engine already")
        limits = self.config.limits
        for image in images:
            image.check(limits)
        num_images = sum(image.num_images for image in images)
        if not 1 <= num_images <= limits.max_images:
            raise RequestError(
                "num_images", f"must be between 1 and {limits.max_images}, got {num_images}"
            )
        check_urgency(priority, deadline_s)
        now = self._clock()
        request = Request(
            request_id,
            tuple(single for image in images for single in image.singles()),
            priority,
            now,
            None if deadline_s is None else now + deadline_s,
        )
        if request.adapters and not self._executor.adapters_fit(request.adapters):
            raise RequestError("adapters", "need more memory together than the device has for them")
        self._table.estimate(request)
        self._admission.check(request, self.outstanding_ms)
        self._table.add(request)
        self._scheduler.add(request)
        self._deadlines.add(request, len(self.requests))
        self.counters.accepted += 1
        return request

    def expire(self) -> list[Event]:
        """End what is past its deadline; every turn begins with it."""
        overdue = self._deadlines.take_overdue(self._clock()) if self._deadlines else []
        return [self._end(request, State.FAILED, _late(request)) for request in overdue]

    def _end(self, request: Request, state: State, error: Krea2Error | None = None) -> Ended:
        if error is not None:
            # Its frames hold the tensors of what failed, and this request: nothing would go.
            error = error.with_traceback(None)
            error.__cause__ = error.__context__ = None
        request.state, request.error = state, error
        request.reached[state] = self._clock()
        for step in self._scheduler.remove(request):
            self._forget(self._executor.drop_step, step)
        for sequence in request.sequences:
            if not sequence.state.ended:
                sequence.move(State.FAILED if state is State.FAILED else State.CANCELLED)
                self._decoding.pop(sequence, None)
                self._release(sequence)
        self._table.remove(request)
        match state:
            case State.DONE:
                self.counters.done += 1
            case State.FAILED:
                self.counters.failed += 1
            case _:
                self.counters.cancelled += 1
        return Ended(request)

    def _keep_pace(self, results: Collection[StepResult], call_ms: float = 0.0) -> None:
        """Correct all estimates when the machine proves faster or slower.

        Args:
            results: steps of which it is known now how long they took.
            call_ms: for those that took as long as the call.
        """
        for result in results:
            step, blocks = result.step, result.blocks
            branches = [branch for sequence in step.sequences for branch in sequence.tokens]
            estimated_ms = self.cost.step(branches) * step.steps * len(blocks) / step.total_blocks
            measured_ms = call_ms if result.ms is None else result.ms
            corrected = self._calibration.observe(branches, measured_ms, estimated_ms, self.cost)
            if corrected is not None:
                self._correct(corrected)

    def _correct(self, corrected: CostModel) -> None:
        """Go by other estimates from now on."""
        logger.info(
            "krea2-srt: steps do not take as long as estimated; one takes about %.3g ms at "
            "256x256 (not %.3g), %.3g ms at 1024x1024 (not %.3g)",
            *(model.step([tokens]) for tokens in (300, 4160) for model in (corrected, self.cost)),
        )
        self.cost = corrected
        self._table.reprice(self.cost)
        self._scheduler.reorder(self.cost)

    def _drop(self, step: PackStep) -> None:
        """Begin a step anew: what its slices have done is forgotten."""
        if step in self._scheduler.paused:
            self._scheduler.paused.remove(step)
        self._forget(self._executor.drop_step, step)

    def _release(self, sequence: ImageSequence) -> None:
        self._scheduler.leave(sequence)
        self._forget(self._executor.release, sequence)

    def _forget(self, method: Callable[[T], None], what: T) -> None:
        """Clean up; a failure must not lose the end of a request."""
        try:
            method(what)
        except Exception as error:
            self._log_failure("clean-up", error)

    def _memory_may_free(self) -> bool:
        """Give back the memory of steps between slices.

        Returns:
            Whether there were any, or decodes are under way beside the steps: then what ran out
            of memory is worth another try.
        """
        paused = list(self._scheduler.paused)
        for step in paused:
            self._drop(step)
        return bool(paused) or any(sequence.decode_begun for sequence in self._decoding)

    def _move(self, request: Request, state: State) -> None:
        """Move a request and all its sequences."""
        request.state = state
        request.reached[state] = self._clock()
        for sequence in request.sequences:
            sequence.move(state)

    def _count_turn(self, work: Work, seconds: float) -> None:
        counters = self.counters
        counters.turns += 1
        counters.busy_s += seconds
        counters.longest_turn_ms = max(counters.longest_turn_ms, seconds * 1e3)
        match work:
            case Encode():
                counters.encode_s += seconds
            case PackStep():
                counters.step_s += seconds
            case Decode():
                counters.decode_s += seconds

    def _log_failure(self, what: str, error: Exception) -> None:
        if isinstance(error, OutOfMemoryError):
            self.counters.out_of_memory += 1
        known = isinstance(error, Krea2Error)
        logger.warning("krea2-srt: %s failed: %s", what, first_line(error), exc_info=not known)


def check_urgency(priority: int, deadline_s: float | None) -> None:
    """Check what `Engine.submit` is told of a request's urgency.

    Raises:
        RequestError: naming what is wrong.
    """
    if not isinstance(priority, int) or isinstance(priority, bool):
        raise RequestError("priority", f"must be a whole number, got {priority!r}")
    check_number("priority", priority, -MAX_PRIORITY, MAX_PRIORITY)
    if deadline_s is not None:
        check_number("deadline_s", deadline_s, 0.0, MAX_DEADLINE_S)


def _late(request: Request) -> DeadlineError:
    assert request.deadline is not None
    allowed_s = request.deadline - request.arrival
    return DeadlineError(f"deadline of {allowed_s:.3g} s exceeded")
