"""Lists as settings: in a variable or after a flag ``a,b``, or JSON."""

import json
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator
from pydantic_settings import NoDecode

T = TypeVar("T")


def _items(value: Any) -> Any:
    """The items of a text; what is no text is left as it is.

    Both ways may follow one another: what repeated flags say comes joined by commas.
    """
    if not isinstance(value, str):
        return value
    found: list[Any] = []
    rest = value.strip()
    while rest:
        if rest.startswith("["):
            try:
                items, end = json.JSONDecoder().raw_decode(rest)
            except (json.JSONDecodeError, RecursionError):
                raise ValueError('must be a,b or ["a", "b"], and this is no JSON') from None
            found += items
            text, _, rest = rest[end:].partition(",")
            if text.strip():
                raise ValueError('must be a,b or ["a", "b"]: a comma is missing after a ]')
        else:
            text, _, rest = rest.partition(",")
            if text.strip():
                found.append(text.strip())
        rest = rest.strip()
    return found


CommaList = Annotated[list[T], NoDecode, BeforeValidator(_items)]
"""pydantic-settings' own decoding takes nothing but JSON from a variable, and `true` after a flag
for no text.
"""
