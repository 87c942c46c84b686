"""The parser of the stream, in the browser: however the bytes are cut, the events are the same."""

import pytest
from playwright.sync_api import Page

PARSE_ALL_CUTS = """async (bytes) => {
    const { readEvents } = await import("/playground/event_stream.js");
    const parse = async (chunks) => {
        const body = new ReadableStream({
            start(controller) {
                for (const chunk of chunks) controller.enqueue(new Uint8Array(chunk));
                controller.close();
            },
        });
        const events = [];
        for await (const event of readEvents(body)) events.push(event);
        return JSON.stringify(events);
    };
    const answers = new Set([await parse(bytes.map((byte) => [byte]))]);
    for (let cut = 0; cut <= bytes.length; cut += 1) {
        answers.add(await parse([bytes.slice(0, cut), bytes.slice(cut)]));
    }
    return [...answers].map((answer) => JSON.parse(answer));
}"""


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_events_do_not_depend_on_how_the_bytes_are_cut(page: Page, newline: str):
    lines = [
        ": queued ahead=3",
        "",
        "event: image_generation.completed",
        'data: {"prompt": "狐 🦊"}',
        "",
        "id: 7",
        "data:first",
        "data:  second: x",
        "data",
        "",
        "event: without data",
        "",
        ":",
        "event: error",
        "data: cut off",
    ]
    answers = page.evaluate(PARSE_ALL_CUTS, list(newline.join(lines).encode()))
    assert answers == [
        [
            {"comment": "queued ahead=3"},
            {"event": "image_generation.completed", "data": '{"prompt": "狐 🦊"}'},
            {"event": "message", "data": "first\n second: x\n"},
            {"comment": ""},
        ]
    ]


def test_leaving_early_cancels_the_body(page: Page):
    assert page.evaluate(
        """async () => {
            const { readEvents } = await import("/playground/event_stream.js");
            let isCancelled = false;
            const body = new ReadableStream({
                start(controller) {
                    controller.enqueue(new TextEncoder().encode("data: 1\\n\\n"));
                },
                cancel() { isCancelled = true; },
            });
            for await (const _ of readEvents(body)) break;
            return isCancelled;
        }"""
    )
