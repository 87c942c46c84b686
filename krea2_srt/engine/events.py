"""What the engine tells of requests, in the order in which it happened."""

from dataclasses import dataclass

from krea2_srt.engine.lifecycle import Request, Sequence


@dataclass(frozen=True)
class Started:
    """A request waits no longer: its prompts are about to be encoded."""

    request: Request


@dataclass(frozen=True)
class Progress:
    """A sequence has done another step."""

    sequence: Sequence

    @property
    def step(self) -> int:
        return self.sequence.step

    @property
    def total(self) -> int:
        return self.sequence.image.steps


@dataclass(frozen=True)
class Ended:
    """A request is done, failed (see its `error`) or cancelled. The last event of a request."""

    request: Request


Event = Started | Progress | Ended
