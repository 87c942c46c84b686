"""Steps that the device has been told to do, until the host knows what became of them.

The host prepares a step while the one before it runs, and looks at how that ended only then: the
device never waits for the host. To stay with the promise that a new request waits for no more than
what is running, a step is not prepared long before the one before it is expected to end.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from krea2_srt.engine.lifecycle import Sequence
from krea2_srt.engine.work import PackStep, StepResult
from krea2_srt.errors import DeviceLostError, first_line

LEAD_MS = 5.0
"""Before the expected end of a step that the host begins with the next one: enough to receive what
has come, to pick, and to launch."""

_POLL_S = 0.001
_MAX_KNOWN = 256
"""Kinds of steps whose times are remembered."""

_Kind = tuple[tuple[int, ...], int, int]
"""Tokens of the pack's branches, steps, and blocks."""


@dataclass(frozen=True)
class _Flight:
    """One step, or a slice of one.

    Attributes:
        step, blocks: what the device was told to do.
        flags: int32, one per branch, in pinned memory; None before the last block.
        began, ended: events around it.
        since_s: when the device can have begun at the earliest, by the host's clock.
    """

    step: PackStep
    blocks: range
    flags: Tensor | None
    began: "torch.cuda.Event"
    ended: "torch.cuda.Event"
    since_s: float

    @property
    def kind(self) -> _Kind:
        branches = tuple(tokens for sequence in self.step.sequences for tokens in sequence.tokens)
        return branches, self.step.steps, len(self.blocks)


class StepsInFlight:
    """Tells what became of steps: on a CPU at once, on a GPU once its events have come.

    Args:
        device: where steps run, on its current stream.
        clock: seconds.
    """

    def __init__(
        self, device: torch.device, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._cuda = device.type == "cuda"
        self._clock = clock
        self._flights: deque[_Flight] = deque()
        self._known_ms: OrderedDict[_Kind, float] = OrderedDict()
        self._begun_s = 0.0

    def __len__(self) -> int:
        return len(self._flights)

    def begin(self) -> "torch.cuda.Event | None":
        """Before a step is launched: what `launched` needs."""
        if not self._cuda:
            return None
        self._begun_s = self._clock()
        began = torch.cuda.Event(enable_timing=True)
        began.record()
        return began

    def launched(
        self,
        step: PackStep,
        blocks: range,
        flags: Tensor | None,
        began: "torch.cuda.Event | None",
    ) -> list[StepResult]:
        """After it is: wait until those before it have ended, and it nearly has.

        Args:
            step, blocks: what was launched.
            flags: int32 [branches], not 0 where latents are no longer finite, on the device; None
                before the last block.
            began: from `begin`.

        Returns:
            What is known now and was not before.
        """
        if began is None:
            values = None if flags is None else flags.tolist()
            return [StepResult(step, blocks, _non_finite(step, values))]
        if flags is not None:
            # Copied: where a graph has written them, the next replay writes others.
            flags = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True).copy_(
                flags, non_blocking=True
            )
        ended = torch.cuda.Event(enable_timing=True)
        ended.record()
        flight = _Flight(step, blocks, flags, began, ended, self._begun_s)
        # Where the one before it has ended during the launch, this one has begun by now.
        queued = bool(self._flights) and not _has_ended(self._flights[-1])
        before = self._land(len(self._flights))
        self._flights.append(flight)
        expected_ms = self._known_ms.get(flight.kind)
        if expected_ms is None:
            return before + self._land(1)
        end_s = (self._clock() if queued else flight.since_s) + (expected_ms - LEAD_MS) / 1e3
        while (left_s := end_s - self._clock()) > 0 and not _has_ended(flight):
            time.sleep(min(left_s, _POLL_S))
        return before

    def settle(self, sequence: Sequence | None = None) -> list[StepResult]:
        """Wait for those of a sequence, or for all."""
        count = len(self._flights)
        if sequence is not None:
            while count and sequence not in self._flights[count - 1].step.sequences:
                count -= 1
        return self._land(count)

    def _land(self, count: int) -> list[StepResult]:
        """Wait for the first ones."""
        return [self._landed(self._flights.popleft()) for _ in range(count)]

    def _landed(self, flight: _Flight) -> StepResult:
        try:
            flight.ended.synchronize()
            ms = flight.began.elapsed_time(flight.ended)
        except RuntimeError as error:
            # Of a kernel, and no telling whose.
            raise DeviceLostError(first_line(error)) from error
        self._known_ms[flight.kind] = ms
        self._known_ms.move_to_end(flight.kind)
        if len(self._known_ms) > _MAX_KNOWN:
            self._known_ms.popitem(last=False)
        values = None if flight.flags is None else flight.flags.tolist()
        return StepResult(flight.step, flight.blocks, _non_finite(flight.step, values), ms)


def _has_ended(flight: _Flight) -> bool:
    try:
        return flight.ended.query()
    except RuntimeError as error:
        raise DeviceLostError(first_line(error)) from error


def _non_finite(step: PackStep, flags: list[int] | None) -> tuple[Sequence, ...]:
    """The sequences of which the first branch, that of the prompt, has a flag."""
    if flags is None:
        return ()
    ends = accumulate(len(sequence.tokens) for sequence in step.sequences)
    return tuple(
        sequence
        for sequence, end in zip(step.sequences, ends, strict=True)
        if flags[end - len(sequence.tokens)]
    )
