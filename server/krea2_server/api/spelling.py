"""Numbers as text, whole numbers as floats, upper case: values as clients spell them."""

import re
from typing import Any

_MAX_SHOWN = 64

_WHOLE = re.compile(r"[+-]?[0-9]{1,30}(\.0*)?")
_NUMBER = re.compile(r"[+-]?([0-9]{1,30}\.?[0-9]{0,30}|\.[0-9]{1,30})([eE][+-]?[0-9]{1,3})?")


def whole(_name: str, value: Any) -> Any:
    """A whole number, if it is one in any spelling; else the value, which is then refused."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and _WHOLE.fullmatch(value.strip()):
        return int(value.strip().split(".")[0])
    return value


def number(_name: str, value: Any) -> Any:
    """The same of any number."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        return float(value)
    return value


def flag(_name: str, value: Any) -> Any:
    """The same of true and false."""
    if isinstance(value, bool):
        return value
    known = {"true": True, "false": False, 1: True, 0: False, "1": True, "0": False}
    return known.get(lower(value), value) if isinstance(value, str | int) else value


def name_of(_name: str, value: Any) -> Any:
    """The same of a name, which some clients have as a number."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if is_number else value


def shown(value: Any) -> str:
    """A value as errors quote it."""
    try:
        written = repr(value)
    except RecursionError:
        return f"a {type(value).__name__} that is nested too deeply"
    return written if len(written) <= _MAX_SHOWN else f"{written[:_MAX_SHOWN]}..."


def is_blank(value: Any) -> bool:
    """Whether a value is as good as none: nothing, or a text of spaces."""
    return value is None or (isinstance(value, str) and not value.strip())


def printable(name: Any) -> str:
    """A name of the client's as warnings have it: short, and without halves of surrogate pairs."""
    return whole_text(str(name)[:_MAX_SHOWN])


def whole_text(text: str) -> str:
    """A text that gets into JSON, whoever sent it: halves of surrogate pairs are question marks."""
    return text.encode(errors="replace").decode()


def lower(value: Any) -> Any:
    """Text in small letters; anything else as it is."""
    return value.strip().lower() if isinstance(value, str) else value
