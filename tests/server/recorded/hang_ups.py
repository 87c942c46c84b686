"""Clients that go before their answer is there, and what the engine then hears."""

from tests.server.recorded.exchange import (
    ACCEPTED,
    HOLD,
    IMAGES,
    TWO_STEPS,
    Exchange,
    generate,
    stream,
)

HANG_UPS = [
    Exchange(
        "a client that hangs up in its body",
        raw=f"POST {IMAGES} HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{{".encode(),
        hangs_up=True,
    ),
    stream(
        "a client that hangs up before its stream is accepted",
        engine={"hold": True, "silent": True},
        hangs_up=True,
    ),
    generate("a client that hangs up before its answer", HOLD, hangs_up=True),
    stream(
        "a client that hangs up while it is queued",
        engine=HOLD,
        hangs_up=True,
        until=(ACCEPTED, 1),
    ),
    stream(
        "a client that hangs up after a preview",
        TWO_STEPS,
        engine={"hold_at_preview": True},
        hangs_up=True,
        until=('"}\n\n\r\n', 1),
    ),
]
