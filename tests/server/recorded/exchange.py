"""An exchange: a request, and what the engine behind the server does meanwhile."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.server.recorded.stage import Stage

IMAGES = "/v1/images/generations"
HOST = "images.test"
JSON = {"content-type": "application/json"}
LAST_URL = "the path of the last URL that the server gave"
DEFAULTS = {"prompt": "a red fox", "size": "64x64", "seed": 7}

HOLD = {"hold": True}
TWO_STEPS = {"num_inference_steps": 2, "partial_images": 1}
ACCEPTED = ": queued ahead=0\n\n"


@dataclass(frozen=True)
class Exchange:
    """A request, and what is done about it.

    Attributes:
        name: its key in the recording.
        path: `LAST_URL` is the one that an exchange before it was given.
        raw: all bytes that are sent, in place of those of method, path, headers and body.
        engine: what the engine is told first, see `ToldEngine.tell`, and whether it is ``away``;
            also whether ``images_are_refused`` by the content checks, or the ``checks_fail``.
        beside: requests that the engine holds from before this one until it is answered.
        releases: whether the engine goes on with those then.
        before: called when the engine has those.
        meanwhile: called when the engine holds the request, or the server waits for its body.
        until: text to read, and how often, before the engine goes on or the client hangs up.
        hangs_up: whether the client does, instead of reading to the end.
        logged: whether the server has a line in its log for it.
        counted: whether the server can be asked afterwards what it has counted.
    """

    name: str
    method: str = "POST"
    path: str = IMAGES
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    raw: bytes | None = None
    engine: Mapping[str, object] = field(default_factory=dict)
    beside: "tuple[Exchange, ...]" = ()
    releases: bool = True
    before: "Callable[[Stage], None] | None" = None
    meanwhile: "Callable[[Stage], None] | None" = None
    until: tuple[str, int] | None = None
    hangs_up: bool = False
    logged: bool = True
    counted: bool = True

    @property
    def may_count(self) -> bool:
        """Whether there may be a request for images in it, and the server can be asked."""
        return self.counted and (self.path.startswith(IMAGES) or bool(self.beside))

    @property
    def has_seed(self) -> bool:
        """Whether the client chooses it."""
        return b'"seed"' in (self.raw or self.body or b"")

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of its JSON; none of a body that has none."""
        try:
            values = json.loads(self.body or b"")
        except (ValueError, RecursionError):
            return {}
        return values if isinstance(values, dict) else {}


def generate(
    name: str,
    engine: Mapping[str, object] | None = None,
    headers: Mapping[str, str] | None = None,
    leave_out: tuple[str, ...] = (),
    fields: Mapping[str, object] | None = None,
    **options: Any,
) -> Exchange:
    """A request for images.

    Args:
        leave_out: of the fields that it has by default.
        fields: others.
        options: of the exchange.
    """
    values = {key: value for key, value in DEFAULTS.items() if key not in leave_out}
    body = json.dumps({**values, **(fields or {})}).encode()
    return Exchange(
        name, headers={**JSON, **(headers or {})}, body=body, engine=engine or {}, **options
    )


def stream(name: str, fields: Mapping[str, object] | None = None, **options: Any) -> Exchange:
    """A request for events; see `generate`."""
    return generate(name, fields={"stream": True, **(fields or {})}, **options)


def get(path: str, name: str = "", method: str = "GET", **options: Any) -> Exchange:
    """A request without a body."""
    return Exchange(name or f"{method} {path}", method, path, **options)


HELD = generate("held")
"""To be beside another."""
