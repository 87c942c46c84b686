"""What crosses the pipes between the HTTP process and that of the models.

The HTTP process sends one `Load`, which is answered by `Loaded` or `NotLoaded`; then any number of
`Check`, each answered once, by `Scores` or `Failed`, in any order. `Drop` makes it soon.

A message on a pipe is its length and its pickle: both ends are the same program, and nobody else
has the pipe.
"""

import pickle
import struct
from dataclasses import dataclass, field
from typing import Any, Literal

_LENGTH = struct.Struct("!Q")
HEADER_BYTES = _LENGTH.size


@dataclass(frozen=True)
class ModelSpec:
    """A classifier to load.

    Attributes:
        kind: of what, texts or images.
        path: folder or repo id.
        device: torch's name of it.
    """

    kind: Literal["text-classification", "image-classification"]
    path: str
    device: str


@dataclass(frozen=True)
class Load:
    """Load these; `Check.model` is an index among them."""

    models: tuple[ModelSpec, ...]


@dataclass(frozen=True)
class Loaded:
    """All are there.

    Attributes:
        labels: of each model.
    """

    labels: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class NotLoaded:
    """One cannot be loaded.

    Attributes:
        model: its index.
        field: of its `ModelSpec`, in the policy's words: ``model`` or ``device``.
        reason: for a person.
    """

    model: int
    field: str
    reason: str


@dataclass(frozen=True)
class Check:
    """What does a model say of texts, or of images as files?"""

    check_id: int
    model: int
    # Not shown: a prompt must get into no log, by whatever way.
    contents: tuple[str | bytes, ...] = field(repr=False)


@dataclass(frozen=True)
class Drop:
    """Nobody waits for a check any more."""

    check_id: int


@dataclass(frozen=True)
class Scores:
    """The highest score of each label over all contents of a check."""

    check_id: int
    scores: dict[str, float]


@dataclass(frozen=True)
class Failed:
    """A check has no scores; why, without a word of its contents."""

    check_id: int
    reason: str


def encode(message: Any) -> bytes:
    """Header and body."""
    body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(body)) + body


def body_bytes(header: bytes) -> int:
    """How many bytes follow a header."""
    length: int = _LENGTH.unpack(header)[0]
    return length


def decode(body: bytes) -> Any:
    """The message again."""
    return pickle.loads(body)
