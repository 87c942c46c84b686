"""A client's request in the scheduler process, whichever way it came."""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import ClassVar, Protocol

import numpy as np

from krea2_srt.engine.events import Progress
from krea2_srt.engine.lifecycle import Request, State
from krea2_srt.request import AdapterChoice, ImageRequest, RequestLimits

# What a request's time is spent on: the states that begin and end each stage.
_STAGES = (
    ("queue", State.WAITING, State.ENCODING),
    ("encode", State.ENCODING, State.DENOISING),
    ("denoise", State.DENOISING, State.DECODING),
    ("decode", State.DECODING, State.DONE),
)


class Exchange(Protocol):
    """A request, from its arrival to its one answer: `finished`, `failed` or `abandoned` is called
    once.
    """

    ASLEEP: ClassVar[str]
    """What is said while the weights are away."""

    held: object
    """What is kept for as long as it lasts: its adapters."""

    @property
    def identity(self) -> bytes:
        """The client's socket."""

    @property
    def request_id(self) -> str:
        """The client's name for it."""

    @property
    def priority(self) -> int:
        """See `krea2_srt.engine.policy`."""

    @property
    def deadline_s(self) -> float | None:
        """Seconds from its arrival after which nobody waits any more."""

    @property
    def adapters(self) -> frozenset[AdapterChoice]:
        """Which its images are generated with, by name."""

    def images(self, limits: RequestLimits) -> list[ImageRequest]:
        """What to generate, without adapters; checks what the engine does not look at.

        Raises:
            Krea2Error: it is not possible.
        """

    def accepted(self, request: Request) -> None:
        """It is in the engine."""

    def started(self) -> None:
        """Its first unit of work is about to run."""

    def progress(self, event: Progress) -> None:
        """One of its sequences has done a step."""

    def failed(self, error: Exception) -> None:
        """It was refused, has failed or was cancelled: answer with that."""

    def abandoned(self, error: Exception) -> None:
        """The same where its client no longer listens."""

    def finished(self, request: Request, pixels: Sequence[np.ndarray | None]) -> "Future[None]":
        """It is done: encode its pictures in a thread, and answer from there.

        Args:
            pixels: uint8 [height, width, 3] of each of its images.
        """


def stage_ms(request: Request) -> dict[str, float]:
    """Milliseconds that a request that is done has spent in each stage."""
    at = request.reached
    return {name: (at[end] - at[start]) * 1e3 for name, start, end in _STAGES}


def summary(request: Request) -> str:
    """One line about a request that is done, for the log."""
    image = request.images[0]
    stages = ", ".join(f"{name} {ms:.0f}" for name, ms in stage_ms(request).items())
    total = (request.reached[State.DONE] - request.arrival) * 1e3
    what = f"{len(request.images)} x {image.size}, {image.steps} steps"
    uses = sorted(image.adapters, key=lambda use: use.name)
    adapters = ", ".join(f"{use.name}:{use.scale:g} ({use.digest[:12]})" for use in uses)
    return f"done in {total:.0f} ms ({stages}); {what}{f', with {adapters}' if adapters else ''}"
