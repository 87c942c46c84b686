"""A server with limits of its own, which keeps no images and ignores unknown fields."""

from tests.server.recorded.exchange import (
    ACCEPTED,
    HELD,
    HOLD,
    IMAGES,
    JSON,
    TWO_STEPS,
    Exchange,
    generate,
    get,
    stream,
)

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
    generate("one request too many", beside=(HELD,)),
    stream("one stream too many", beside=(HELD,)),
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
    stream("silence while it is queued", engine=HOLD, until=(ACCEPTED, 2), hangs_up=True),
    stream(
        "silence while it is generated",
        TWO_STEPS,
        engine={"hold_at_preview": True},
        until=(": generating\n\n", 1),
        hangs_up=True,
    ),
]
