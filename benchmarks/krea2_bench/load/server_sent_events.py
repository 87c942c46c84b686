"""Server-sent events from a stream of bytes, whose lines may have megabytes."""

import re
from collections.abc import AsyncIterable, AsyncIterator

_BLANK_LINE = re.compile(rb"\r\n\r\n|\n\n")


async def event_data(chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """The data of each event; comments and other fields are passed over."""
    buffer = bytearray()
    searched = 0
    async for chunk in chunks:
        buffer += chunk
        while (end := _BLANK_LINE.search(buffer, searched)) is not None:
            block = bytes(buffer[: end.start()])
            del buffer[: end.end()]
            searched = 0
            if data := _data(block):
                yield data
        searched = max(0, len(buffer) - 3)  # a blank line may be cut in two


def _data(block: bytes) -> bytes:
    lines = [line.removesuffix(b"\r") for line in block.split(b"\n")]
    found = [line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:")]
    return b"\n".join(found)
