"""Streams and events as vector clocks: what is known to be done when something begins.

Every operation is numbered on its stream. A clock says, for each stream, up to which operation all
is done before whatever carries the clock. Streams know each other through events alone, and the
host knows of them what it has waited for: torch's streams have no order by themselves.
"""

from collections import deque
from typing import TYPE_CHECKING, Any

import torch

from tests.torch.cuda_rules.rules import CudaError, Rule

if TYPE_CHECKING:
    from tests.torch.cuda_rules.graph import Capture, Graph
    from tests.torch.cuda_rules.machine import Machine

Clock = dict[int, int]

REMEMBERED = 20_000
"""Operations of a stream that a capture is compared with."""


def merge(clock: Clock, other: Clock) -> None:
    """Know what the other knows too."""
    for stream, number in other.items():
        if clock.get(stream, 0) < number:
            clock[stream] = number


class Stream:
    """`torch.cuda.Stream`."""

    machine: "Machine"

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.stream_id = self.cuda_stream = len(self.machine.streams)
        self.device = torch.device("cuda", 0)
        self.device_index = 0
        self.priority = priority
        self.clock: Clock = {self.stream_id: 0}
        self.capture: Graph | None = None
        self.operations: deque[Any] = deque(maxlen=REMEMBERED)
        self.machine.streams.append(self)

    def __repr__(self) -> str:
        return f"stream {self.stream_id}" if self.stream_id else "the default stream"

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return self.stream_id

    def __enter__(self) -> "Stream":
        self._outer = self.machine.current_stream()
        self.machine.set_stream(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.machine.set_stream(self._outer)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = self.machine.Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        with self.machine.lock:
            self.machine.reap()
            if event.capture is not None and event.capture.graph is not None:
                event.capture.graph.join(self)
            elif self.capture is not None and event.clock:
                self.capture.invalidate(
                    Rule.OUTSIDE, f"{self} is captured and waits for work that is not"
                )
            merge(self.clock, event.clock)

    def wait_stream(self, stream: "Stream") -> None:
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        captured = None if self.capture is None else self.capture.state
        self.machine.wait(self.clock, f"synchronize of {self}", captured)

    def query(self) -> bool:
        return self.record_event().query()


class Event:
    """`torch.cuda.Event`. Done at the second look, or once the host has waited for later work."""

    machine: "Machine"

    def __init__(self, enable_timing: bool = False, blocking: bool = False, **_: Any) -> None:
        self.enable_timing = enable_timing
        self.clock: Clock = {}
        self.capture: Capture | None = None
        self.looks = 0
        self.number = 0

    def record(self, stream: Stream | None = None) -> None:
        machine = self.machine
        with machine.lock:
            machine.reap()
            stream = machine.current_stream() if stream is None else stream
            self.clock = dict(stream.clock)
            self.capture = None if stream.capture is None else stream.capture.state
            self.looks = 0
            self.number = machine.work

    def wait(self, stream: Stream | None = None) -> None:
        (self.machine.current_stream() if stream is None else stream).wait_event(self)

    def query(self) -> bool:
        machine = self.machine
        with machine.lock:
            machine.reap()
            machine.no_capture("query of an event", self.capture)
            self.looks += 1
            known = all(machine.host.get(s, 0) >= n for s, n in self.clock.items())
            if not known and self.looks <= machine.looks:
                return False
            merge(machine.host, self.clock)
            return True

    def synchronize(self) -> None:
        self.machine.wait(self.clock, "synchronize of an event", self.capture)

    def elapsed_time(self, end: "Event") -> float:
        """A thousandth of a millisecond for each operation of the machine."""
        if not (self.enable_timing and end.enable_timing):
            raise CudaError("CUDA error: both events must be made with enable_timing")
        return (end.number - self.number + 1) / 1e3
