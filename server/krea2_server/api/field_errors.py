"""What is wrong with a field of a client's, raised while its body is validated."""

from krea2_server.api.spelling import whole_text


class FieldError(ValueError):
    """A field cannot be what it is.

    Args:
        field: as the client called it.
        message: what is wrong, and what would be right.
        code: of the API's error.
    """

    def __init__(self, field: str, message: str, code: str = "invalid_value") -> None:
        # Pydantic carries it, which takes no halves of surrogate pairs.
        super().__init__(whole_text(message))
        self.field = field
        self.code = code


class UnsupportedError(FieldError):
    """A field, or a value of it, that is known, and that this model can do nothing with."""

    def __init__(self, field: str, reason: str, value: str | None = None) -> None:
        what = field if value is None else f"{field}: {value}"
        code = "unsupported_parameter" if value is None else "unsupported_value"
        super().__init__(field, f"{what} is not supported: {reason}", code)


class UnknownFieldError(FieldError):
    """A field that is not known.

    Args:
        field: which.
        meant: the one that it may be meant to be.
    """

    def __init__(self, field: str, meant: str | None = None) -> None:
        hint = f"; did you mean {meant!r}?" if meant else ""
        super().__init__(field, f"{field!r} is not known{hint}", "unknown_parameter")
