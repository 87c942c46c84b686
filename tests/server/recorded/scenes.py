"""Exchanges that take a server of their own, or in which something happens meanwhile."""

from krea2_server.storage.signatures import sign
from tests.server.recorded.exchange import (
    IMAGES,
    JSON,
    LAST_URL,
    Exchange,
    generate,
    get,
    stream,
)
from tests.server.recorded.stage import Stage

STORAGE_KEY = "recorded-storage-key"
TEAM, BATCH, SLOW = "sk-team-0123456789", "sk-batch-0123456789", "sk-slow-0123456789"

_HELD = generate("held", {"hold": True})
_HOLD = {"hold": True}
_TWO_STEPS = {"num_inference_steps": 2, "partial_images": 1}
_ACCEPTED = ": queued ahead=0\n\n"
_GONE = "0" * 32 + ".png"


def _signed(name: str, expires: int) -> str:
    signature = sign(STORAGE_KEY.encode(), name, expires)
    return f"/v1/images/files/{name}?expires={expires}&signature={signature}"


HANG_UPS = [
    generate("a client that hangs up before its answer", _HOLD, hangs_up=True),
    stream(
        "a client that hangs up while it is queued",
        engine=_HOLD,
        hangs_up=True,
        until=(_ACCEPTED, 1),
    ),
    stream(
        "a client that hangs up after a preview",
        _TWO_STEPS,
        engine={"hold_at_preview": True},
        hangs_up=True,
        until=('"}\n\n\r\n', 1),
    ),
]

QUEUES = [
    get("/v1/queue", "an idle queue", logged=False, before=lambda stage: stage.wait_for_queue(0)),
    get(
        "/v1/queue",
        "a queue with two requests in it",
        beside=(_HELD, _HELD),
        logged=False,
        before=lambda stage: stage.wait_for_queue(2),
    ),
    stream("a stream behind another request", beside=(_HELD,), until=("ahead=1\n\n", 1)),
]

FILES = [
    generate("a URL", fields={"response_format": "url", "output_format": "webp"}),
    get(LAST_URL, "the file behind it"),
    get(LAST_URL, "its head", method="HEAD"),
    get(LAST_URL + "0", "a signature that is too long"),
    get(LAST_URL + "&x=1", "a query that says more"),
    get(_signed(_GONE, 1_000_000_000), "a URL that has expired"),
    get(_signed(_GONE, 99_999_999_999), "a URL whose file is gone"),
    get(_signed(_GONE, 99_999_999_999)[:-1] + "g", "a signature that is none"),
]

OPERATIONS = [
    get("/health", logged=False),
    get("/health", method="HEAD", logged=False),
    get("/ready", logged=False),
    get("/ready", method="HEAD", logged=False),
    get("/v1/models"),
    get("/v1/models/krea-2-turbo"),
    get("/v1/models/gpt-image-1"),
    get("/v1/models/krea/Krea-2-Turbo"),
    get("/openapi.json"),
]

METRICS = [
    get(
        "/metrics",
        "the metrics afterwards",
        logged=False,
        before=lambda stage: stage.wait_for_queue(0),
    )
]


def _with_key(key: str, name: str, fields: dict[str, object], **options: object) -> Exchange:
    return generate(name, headers={"authorization": f"Bearer {key}"}, fields=fields, **options)


KEYS_FILE = f"""
keys:
  - {{name: team, key: {TEAM}, low_moderation: true}}
  - {{name: batch, key: {BATCH}, max_concurrent: 1, max_priority: 0}}
  - {{name: slow, key: {SLOW}, requests_per_minute: 1}}
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

BOUNDS = [
    generate("n above the server's own limit", fields={"n": 3}),
    generate("n within the server's own limit", fields={"n": 2}),
    generate("a prompt above the server's own limit", fields={"prompt": "x" * 41}),
    generate("a negative prompt above it", fields={"negative_prompt": "x" * 41}),
    generate("a URL where nothing is kept", fields={"response_format": "url"}),
    stream("a stream with URLs where nothing is kept", {"response_format": "url"}),
    generate("fields that are not known", fields={"cfg_scale": 3, "x": {"y": [1]}}),
    generate("fields that are not supported", fields={"style": "vivid"}),
    generate("the model by another name", fields={"model": "krea-2-turbo"}),
    generate("the model by its name", fields={"model": "foxes"}),
    generate("one request too many", beside=(_HELD,)),
    stream("one stream too many", beside=(_HELD,)),
    generate("a body above the server's own limit", fields={"prompt": "x" * 2000}),
    Exchange(
        "a body in chunks above the limit",
        raw=b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" % IMAGES.encode()
        + b"transfer-encoding: chunked\r\n\r\n600\r\n%s\r\n600\r\n" % (b"x" * 0x600)
        + b"y" * 0x600
        + b"\r\n",
    ),
    Exchange("a body that does not come", headers={**JSON, "content-length": "10"}),
    Exchange("headers that do not come", raw=b"GET / HTTP/1.1\r\nhost: x\r\n", logged=False),
    Exchange(
        "headers above the server's own limit",
        raw=b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 5000 + b"\r\n\r\n",
        logged=False,
    ),
    get("/", "no playground"),
    get("/v1/images/files/nothing.png", "no files"),
    get("/v1/models"),
    stream("silence while it is queued", engine=_HOLD, until=(_ACCEPTED, 2), hangs_up=True),
    stream(
        "silence while it is generated",
        _TWO_STEPS,
        engine={"hold_at_preview": True},
        until=(": generating\n\n", 2),
        hangs_up=True,
    ),
]

POLICY = """
checkers:
  - type: openai-moderations
    url: "{moderations}"
    categories: {violence: 0.5}
    low: {violence: 1}
timeout_s: 120
"""

_FORBIDDEN = {"prompt": "a forbidden fox"}
_NEGATIVE = {"negative_prompt": "forbidden", "guidance_scale": 1}
_STREAM = {"stream": True}
_BAD = {"images_are_refused": True}
_FAILS = {"checks_fail": True}

MODERATED = [
    _with_key(TEAM, "an allowed stream", {**_STREAM, **_TWO_STEPS}),
    _with_key(TEAM, "a forbidden prompt", _FORBIDDEN),
    _with_key(TEAM, "a forbidden prompt in a stream", {**_STREAM, **_FORBIDDEN}),
    _with_key(
        TEAM, "a forbidden prompt that low lets through", {**_FORBIDDEN, "moderation": "low"}
    ),
    _with_key(TEAM, "a forbidden negative prompt", _NEGATIVE),
    _with_key(TEAM, "a forbidden image", {}, engine=_BAD),
    _with_key(TEAM, "a forbidden image in a stream", _STREAM, engine=_BAD),
    _with_key(TEAM, "a forbidden preview", {**_STREAM, **_TWO_STEPS}, engine=_BAD),
    _with_key(TEAM, "nobody can check", {}, engine=_FAILS),
    _with_key(TEAM, "nobody can check a stream", _STREAM, engine=_FAILS),
    *METRICS,
]

_AWAY = {"away": True}

LEAVING = [
    generate("no engine yet", _AWAY),
    stream("no engine yet for a stream", engine=_AWAY),
    generate("refused before there is an engine", _AWAY, fields={"n": 0}),
    generate("the model's name before there is an engine", _AWAY, fields={"model": "krea-9"}),
    get("/health", engine=_AWAY, logged=False),
    get("/ready", "not ready before there is an engine", engine=_AWAY, logged=False),
    get("/v1/models", "the models before there is an engine", engine=_AWAY),
    get("/v1/models/krea-2-turbo", "the model before there is an engine", engine=_AWAY),
    get("/v1/queue", "the queue before there is an engine", engine=_AWAY, logged=False),
    generate("the engine is there"),
    generate("an engine that exits", meanwhile=Stage.stop_engine),
    generate("while the engine is away", _AWAY),
    stream("a stream while the engine is away", engine=_AWAY),
    get("/ready", "not ready while the engine is away", engine=_AWAY, logged=False),
    stream(
        "an engine that exits before it has accepted",
        engine={"silent": True},
        meanwhile=Stage.stop_engine,
    ),
    stream("an engine that exits after it has accepted", meanwhile=Stage.stop_engine),
    generate("the engine is back"),
    # The last: the server ends with it.
    generate(
        "a server that ends, and what it still has",
        headers={"expect": "100-continue"},
        meanwhile=Stage.drain,
        beside=(_HELD, stream("held")),
        releases=False,
        counted=False,
    ),
]
