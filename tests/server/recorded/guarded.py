"""A server with keys, whose rights and limits differ, and with content checks."""

from collections.abc import Mapping
from typing import Any

from tests.server.recorded.exchange import JSON, TWO_STEPS, Exchange, generate, get, stream
from tests.server.recorded.operations import METRICS

TEAM, BATCH, SLOW = "sk-team-0123456789", "sk-batch-0123456789", "sk-slow-0123456789"


def _with_key(key: str, name: str, fields: Mapping[str, object], **options: Any) -> Exchange:
    return generate(name, headers={"authorization": f"Bearer {key}"}, fields=fields, **options)


KEYS_FILE = f"""
keys:
  - {{name: team, key: {TEAM}, low_moderation: true}}
  - {{name: batch, key: {BATCH}, max_concurrent: 1, max_priority: 0}}
  - {{name: slow, key: {SLOW}, requests_per_minute: 1}}
"""

POLICY = """
checkers:
  - type: openai-moderations
    url: "{moderations}"
    categories: {violence: 0.5}
    low: {violence: 1}
timeout_s: 120
"""

_SCHEMES = {
    "no key": {},
    "an empty key": {"authorization": "Bearer "},
    "another scheme": {"authorization": f"Basic {TEAM}"},
    "a key without a scheme": {"authorization": TEAM},
    "a wrong key": {"authorization": f"Bearer {TEAM}x"},
}

KEYS = [
    *(generate(name, headers=headers) for name, headers in _SCHEMES.items()),
    stream("a stream without a key"),
    generate("a refusal without a key", fields={"n": 0}),
    Exchange("too large a body without a key", headers={**JSON, "content-length": "99999999"}),
    _with_key(TEAM, "a key", {}),
    generate("a scheme in small letters", headers={"authorization": f"bearer  {TEAM} "}),
    _with_key(TEAM, "low moderation with the right to it", {"moderation": "low"}),
    _with_key(TEAM, "a high priority with the right to it", {"priority": 10}),
    _with_key(BATCH, "low moderation without the right", {"moderation": "low"}),
    _with_key(BATCH, "priority without the right", {"priority": 1}),
    _with_key(BATCH, "priority without the right in a stream", {"priority": 1, "stream": True}),
    _with_key(BATCH, "more at a time than the key may", {}, beside=(_with_key(BATCH, "held", {}),)),
    _with_key(
        BATCH,
        "more streams at a time than the key may",
        {"stream": True},
        beside=(_with_key(BATCH, "held", {}),),
    ),
    _with_key(BATCH, "after that", {}),
    _with_key(SLOW, "the first in a minute", {}),
    _with_key(SLOW, "the second in a minute", {}),
    _with_key(SLOW, "the third in a minute, a stream", {"stream": True}),
    get("/v1/models", "the models without a key"),
    get("/v1/queue", "the queue without a key", logged=False),
    get("/v1/nowhere", "nothing without a key"),
    get("/v1/models", "the models", headers={"authorization": f"Bearer {TEAM}"}),
    get("/health", logged=False),
    get("/v1/images/files/nothing.png", "no file without a key"),
]

_FORBIDDEN = {"prompt": "a forbidden fox"}
_NEGATIVE = {"negative_prompt": "forbidden", "guidance_scale": 1}
_STREAM = {"stream": True}
_BAD = {"images_are_refused": True}
_FAILS = {"checks_fail": True}

MODERATED = [
    _with_key(TEAM, "an allowed stream", {**_STREAM, **TWO_STEPS}),
    _with_key(TEAM, "a forbidden prompt", _FORBIDDEN),
    _with_key(TEAM, "a forbidden prompt in a stream", {**_STREAM, **_FORBIDDEN}),
    _with_key(
        TEAM, "a forbidden prompt that low lets through", {**_FORBIDDEN, "moderation": "low"}
    ),
    _with_key(TEAM, "a forbidden negative prompt", _NEGATIVE),
    _with_key(TEAM, "a forbidden image", {}, engine=_BAD),
    _with_key(TEAM, "a forbidden image in a stream", _STREAM, engine=_BAD),
    _with_key(TEAM, "a forbidden preview", {**_STREAM, **TWO_STEPS}, engine=_BAD),
    _with_key(TEAM, "nobody can check", {}, engine=_FAILS),
    _with_key(TEAM, "nobody can check a stream", _STREAM, engine=_FAILS),
    *METRICS,
]
