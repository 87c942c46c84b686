"""What crosses the scheduler's channel beside SGLang's own requests.

All are pickled, as SGLang's are. Answers to `Cancel` and `GetStatistics` come as an
``OutputBatch`` with the answer in ``output``; a subscriber, whose socket must be a DEALER, gets
any number of `ProgressUpdate` and a last `RequestEnded`, without an ``OutputBatch`` around them.
A client that sends a request and then a subscription over one DEALER socket misses nothing.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

VERSION = 1
"""Of these messages; a scheduler refuses others by name."""


@dataclass(frozen=True)
class RequestOptions:
    """What SGLang's request has no field for; travels in ``Req.extra["krea2"]``.

    Attributes:
        priority: see `krea2_srt.engine.policy`.
        deadline_s: seconds from now after which nobody waits any more.
    """

    priority: int = 0
    deadline_s: float | None = None
    version: int = VERSION


@dataclass(frozen=True)
class Cancel:
    """End the requests of an id before their next step. Answer: {"cancelled": how many}."""

    request_id: str
    version: int = VERSION


@dataclass(frozen=True)
class Subscribe:
    """Be told of every step of a request.

    Attributes:
        request_id: which.
        previews: how many pictures on the way to send of each of its images, evenly spread.
    """

    request_id: str
    previews: int = 0
    version: int = VERSION


@dataclass(frozen=True)
class GetStatistics:
    """Answer: the engine's statistics, a dict; of several replicas, through SGLang's client, a list
    of them.
    """

    version: int = VERSION


@dataclass(frozen=True)
class ProgressUpdate:
    """A step is done. Where a preview is due, a second message has it, drawn a little later.

    Attributes:
        sequence: index of the image in its request.
        step, total: steps done, of how many.
        preview: uint8 [height, width, 3], at most 256 x 256, of that step.
    """

    request_id: str
    sequence: int
    step: int
    total: int
    preview: np.ndarray[Any, Any] | None = None
    version: int = VERSION


@dataclass(frozen=True)
class RequestEnded:
    """The last message of a subscription.

    Attributes:
        state: ``done``, ``failed``, ``cancelled``, or ``unknown`` where no such request is here.
        error: of a failed one.
    """

    request_id: str
    state: str
    error: "EngineError | None" = None
    version: int = VERSION


@dataclass(frozen=True)
class EngineError:
    """Why a request was refused or failed; the attribute ``engine_error`` of its ``OutputBatch``.

    Attributes:
        code: ``invalid_request``, ``queue_full``, ``draining``, ``deadline``, ``out_of_memory``,
            ``cancelled`` or ``failed``.
        message: for a person.
        field: that is wrong, in an invalid request.
        retry_after_s: when the queue is expected to have room.
    """

    code: str
    message: str
    field: str | None = None
    retry_after_s: float | None = None
    version: int = VERSION
