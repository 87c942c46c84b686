"""A request and its sequences on their way through the engine."""

from dataclasses import dataclass, field
from enum import Enum

from krea2_srt.errors import Krea2Error
from krea2_srt.request import ImageRequest, estimated_text_tokens


class State(Enum):
    WAITING = "waiting"
    ENCODING = "encoding"
    DENOISING = "denoising"
    DECODING = "decoding"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    # By identity, as members compare: an Enum's own is written in Python, and every turn looks up
    # hundreds of states.
    __hash__ = object.__hash__

    @property
    def ended(self) -> bool:
        return self in ENDED


ENDED = frozenset({State.DONE, State.FAILED, State.CANCELLED})

_BROKEN_OFF = frozenset({State.FAILED, State.CANCELLED})

TRANSITIONS: dict[State, frozenset[State]] = {
    State.WAITING: _BROKEN_OFF | {State.ENCODING},
    State.ENCODING: _BROKEN_OFF | {State.DENOISING},
    State.DENOISING: _BROKEN_OFF | {State.DECODING},
    State.DECODING: _BROKEN_OFF | {State.DONE},
    State.DONE: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
}


class IllegalTransition(Exception):
    """A bug in the engine: a sequence was to go where its state does not lead."""


@dataclass(eq=False)
class Sequence:
    """One image of a request.

    Attributes:
        request: which it belongs to.
        index: its place in the request.
        image: what to generate; a request for exactly one image.
        tokens: of each of its branches (one, or two under guidance). An estimate until its prompt
            is encoded.
        state: where it is.
        step: steps done; counted by the executor that does them.
        joined_before: the step before which it last had others' prompts encoded, to join its pack.
        begun: whether its first step has begun and it has not ended.
        decode_begun: whether a slice of its decode has run.
        decode_retried: whether its decode has run out of memory once.
        wants_previews: whether somebody wants previews of it.
    """

    request: "Request"
    index: int
    image: ImageRequest
    tokens: tuple[int, ...]
    state: State = State.WAITING
    step: int = 0
    joined_before: int | None = None
    begun: bool = False
    decode_begun: bool = False
    decode_retried: bool = False
    wants_previews: bool = False

    def move(self, state: State) -> None:
        """Change the state.

        Raises:
            IllegalTransition: it is not a legal one.
        """
        if state not in TRANSITIONS[self.state]:
            raise IllegalTransition(
                f"sequence {self.index} of request {self.request.id}: "
                f"{self.state.value} -> {state.value}"
            )
        self.state = state


@dataclass(eq=False)
class Request:
    """What a client sent: sequences that end together.

    Attributes:
        id: unique in the engine while the request is in it.
        images: each for exactly one image.
        priority: see `policy`.
        arrival: clock time in seconds.
        deadline: clock time in seconds at which nobody waits for it any more; None is never.
        remaining_ms: estimated work that is left, alone.
        key: its place in the policy's order; smaller runs first.
        error: why it failed.
        text_tokens: of all its prompts, estimated.
        adapters: digests of all that its images are generated with.
        reached: clock time at which it came to each state; with the last of its sequences, where
            they do so one by one.
    """

    id: str
    images: tuple[ImageRequest, ...]
    priority: int
    arrival: float
    deadline: float | None
    sequences: tuple[Sequence, ...] = field(init=False)
    state: State = State.WAITING
    remaining_ms: float = 0.0
    key: float = 0.0
    error: Krea2Error | None = None
    text_tokens: int = 0
    adapters: frozenset[str] = frozenset()
    reached: dict[State, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.text_tokens = sum(map(estimated_text_tokens, self.prompts))
        self.adapters = frozenset(use.digest for image in self.images for use in image.adapters)
        self.reached[State.WAITING] = self.arrival
        self.sequences = tuple(
            Sequence(self, index, image, image.estimated_tokens)
            for index, image in enumerate(self.images)
        )

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def prompts(self) -> list[str]:
        """What has to be encoded, each once; under guidance the negative prompts too."""
        return list(dict.fromkeys(prompt for image in self.images for prompt in image.prompts))


def lone_sequence(image: ImageRequest) -> Sequence:
    """The sequence of a request for one image that is in no engine."""
    return Request("", (image,), priority=0, arrival=0.0, deadline=None).sequences[0]
