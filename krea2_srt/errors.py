"""Errors a user can act on. Command lines turn them into one line and exit code 2."""


class Krea2Error(Exception):
    """Base class: the message alone tells the user what to change."""


class CheckpointError(Krea2Error):
    """A checkpoint is missing, partial or not what its config says."""


class RequestError(Krea2Error):
    """A request asks for something impossible.

    Args:
        field: name of the offending request field, e.g. ``"width"``.
        message: what is wrong with it, with the value.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message

    def renamed(self, field: str) -> "RequestError":
        """The same error under the name that the caller's interface has for the field."""
        return RequestError(field, self.message)
