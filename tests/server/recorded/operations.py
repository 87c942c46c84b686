"""What operators and machines ask, queues, and the files behind URLs."""

from krea2_server.storage.signatures import sign
from tests.server.recorded.exchange import HELD, LAST_URL, generate, get, stream

STORAGE_KEY = "recorded-storage-key"
_GONE = "0" * 32 + ".png"


def _signed(name: str, expires: int) -> str:
    signature = sign(STORAGE_KEY.encode(), name, expires)
    return f"/v1/images/files/{name}?expires={expires}&signature={signature}"


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

QUEUES = [
    get("/v1/queue", "an idle queue", logged=False, before=lambda stage: stage.wait_for_queue(0)),
    get(
        "/v1/queue",
        "a queue with two requests in it",
        beside=(HELD, HELD),
        logged=False,
        before=lambda stage: stage.wait_for_queue(2),
    ),
    stream("a stream behind another request", beside=(HELD,), until=("ahead=1\n\n", 1)),
]

FILES = [
    generate("a URL", fields={"response_format": "url", "output_format": "webp"}),
    get(LAST_URL, "the file behind it"),
    get(LAST_URL + "0", "a signature that is too long"),
    get(LAST_URL + "&x=1", "a query that says more"),
    get(_signed(_GONE, 1_000_000_000), "a URL that has expired"),
    get(_signed(_GONE, 99_999_999_999), "a URL whose file is gone"),
    get(_signed(_GONE, 99_999_999_999)[:-1] + "g", "a signature that is none"),
]

METRICS = [
    get(
        "/metrics",
        "the metrics afterwards",
        logged=False,
        before=lambda stage: stage.wait_for_queue(0),
    )
]
