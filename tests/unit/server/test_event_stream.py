"""A stream lets go of what it holds, however it ends."""

import asyncio

import pytest

from krea2_server.api.event_stream import EventStreamResponse

SCOPE = {"type": "http"}


async def stream(cancels: int, hangs_up: bool, sends: bool) -> list[str]:
    """What was let go of by a stream that is cancelled so many times, a tick apart."""
    closed: list[str] = []

    async def chunks():
        try:
            while True:
                yield b": x\n\n"
                await asyncio.sleep(0)
        finally:
            closed.append("chunks")

    async def receive():
        await asyncio.sleep(0 if hangs_up else 60)
        return {"type": "http.disconnect"}

    async def send(message):
        await asyncio.sleep(0 if sends else 60)

    generator = chunks()
    response = EventStreamResponse(generator, lambda: closed.append("job"))
    task = asyncio.create_task(response(SCOPE, receive, send))
    for _ in range(cancels):
        for _ in range(3):
            await asyncio.sleep(0)
        task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await generator.aclose()
    return closed


@pytest.mark.parametrize("sends", [True, False])
@pytest.mark.parametrize(
    ("cancels", "hangs_up"), [(0, True), *((n, h) for n in (1, 2, 3) for h in (True, False))]
)
def test_a_stream_closes_its_job_once_however_it_ends(cancels, hangs_up, sends):
    closed = asyncio.run(stream(cancels, hangs_up, sends))
    assert closed.count("job") == 1
