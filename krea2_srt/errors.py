"""Errors a user can act on. Command lines turn them into one line and exit code 2.

Each class says what a client of the server is told of it; `kind_of` finds the class of a code.
"""

from typing import ClassVar


class Krea2Error(Exception):
    """Base class: the message alone tells the user what to change.

    Attributes:
        code: for programs; the same on the scheduler's channel and over HTTP.
        status: of HTTP.
        retry: whether the same request can succeed later; None leaves that to the client.
        public_text: what a client is told in place of the message; "" is the message itself.
        field: of the request that is wrong.
        retry_after_s: when to try again, where that is known.
    """

    code: ClassVar[str] = "generation_failed"
    status: ClassVar[int] = 500
    retry: ClassVar[bool | None] = False
    public_text: ClassVar[str] = ""
    field: str | None = None
    retry_after_s: float | None = None


def first_line(error: BaseException) -> str:
    """A foreign error in one line, with its type where its text alone says too little."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class CheckpointError(Krea2Error):
    """A checkpoint is missing, partial or not what its config says."""


class AdapterError(Krea2Error):
    """An adapter is missing, damaged, or holds something that is not understood."""

    code = "adapter_failed"


class UnknownAdapterError(Krea2Error):
    """No adapter is served under a name.

    Args:
        name: that was asked for.
    """

    code = "unknown_adapter"
    status = 404
    field = "adapters"

    def __init__(self, name: str) -> None:
        super().__init__(f"adapters: {name!r} is not served here")


class ModelError(Krea2Error):
    """The model computed something that is no picture."""


def foreign(error: Exception) -> Krea2Error:
    """An error as a client may see it: the text of one that is not ours may hold anything."""
    if isinstance(error, Krea2Error):
        return error
    return ModelError(f"the model failed: {type(error).__name__}")


def not_finite(what: str) -> ModelError:
    """The error for NaNs and infinities in something that the model computed."""
    return ModelError(f"non-finite values in {what}; are the weights corrupt?")


class RequestError(Krea2Error):
    """A request asks for something impossible.

    Args:
        field: name of the offending request field, e.g. ``"width"``.
        message: what is wrong with it, with the value.
    """

    code = "invalid_value"
    status = 400
    retry = None
    field: str

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message

    def renamed(self, field: str) -> "RequestError":
        """The same error under the name that the caller's interface has for the field."""
        return RequestError(field, self.message)


class ConfigError(Krea2Error):
    """A setting of the engine is unknown or has a value that it cannot have."""


class OutOfMemoryError(ModelError):
    """The device's memory ran out for one request."""

    code = "out_of_memory"
    status = 503
    public_text = "there is not enough memory for an image of this size"


class QueueFullError(Krea2Error):
    """There is too much work in the engine.

    Args:
        message: what is queued, and the limit.
        retry_after_s: when the request would be taken, if nothing else came.
    """

    code = "queue_full"
    status = 429
    retry = True

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DrainingError(Krea2Error):
    """The engine finishes what is in it and takes nothing new."""

    code = "engine_unavailable"
    status = 503
    retry = True


class DeadlineError(Krea2Error):
    """A request's deadline passed before it was done."""

    code = "deadline_exceeded"
    status = 504
    field = "deadline_s"


class RequestCancelledError(Krea2Error):
    """A request was cancelled."""

    code = "cancelled"
    status = 499


KINDS: dict[str, type[Krea2Error]] = {
    kind.code: kind
    for kind in (
        RequestError,
        QueueFullError,
        DrainingError,
        DeadlineError,
        OutOfMemoryError,
        RequestCancelledError,
        AdapterError,
        UnknownAdapterError,
    )
}
"""What clients are told apart, by its code; all else is a failure."""


def kind_of(code: str) -> type[Krea2Error]:
    """The class of a code; `Krea2Error` itself of one that is not known."""
    return KINDS.get(code, Krea2Error)


class DeviceLostError(BaseException):
    """The device fails whatever is asked of it: the process has to end, and be started anew.

    No `Exception`: nobody may take it for the failure of one request.
    """


def how_to_install(extra: str = "") -> str:
    """What a user types, in a clone, to get an optional part by its extra's name, or all that is
    not optional.

    Not pip: SGLang pins versions that have no Krea 2, and pip cannot override a pin.
    """
    return f"uv pip install '.{f'[{extra}]' if extra else ''}' (see README.md)"
