"""Objects as settings: in a variable, after a flag and in a file the same JSON."""

import json
from typing import Annotated, Any

from pydantic import BeforeValidator
from pydantic_settings import NoDecode

_FORM = 'must be JSON, {"name": value}'


def _object(value: Any) -> Any:
    """The object of a text; what is no text is left as it is.

    Several may follow one another: what repeated flags say comes joined by commas.
    """
    if not isinstance(value, str):
        return value
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    found: list[tuple[str, Any]] = []
    rest = value.strip()
    while rest:
        try:
            part, end = decoder.raw_decode(rest)
        except (json.JSONDecodeError, RecursionError):
            raise ValueError(_FORM) from None
        rest = rest[end:].strip()
        if not isinstance(part, dict) or (rest and not rest.startswith(",")):
            raise ValueError(_FORM)
        found += part.items()
        rest = rest.removeprefix(",").strip()
    return _unique(found)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, of which no name quietly takes the place of another."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} is there twice")
    return found


JsonObject = Annotated[dict[str, Any], NoDecode, BeforeValidator(_object)]
"""pydantic-settings' own decoding takes `a=1` after a flag, for the text "1", and in a variable
nothing but JSON.
"""
