"""What clients are sent: responses and events, from what was drawn."""

import time
from collections.abc import Iterator
from typing import Any

import orjson
import pybase64

from krea2_srt.sglang.messages import Accepted, Generated, ProgressUpdate
from server.drawing import Drawing
from server.engine_client import Ticket
from server.event_stream import comment, event
from server.image_service import Preview, Result, Update
from server.protocol import Timings, Usage


class Answers:
    """The answers to one request.

    Args:
        drawing: what was asked for.
        model: its name.
    """

    def __init__(self, drawing: Drawing, model: str) -> None:
        self._drawing = drawing
        self._model = model
        self._ticket: Ticket | None = None
        self._stepped = False

    def response(self, result: Result) -> bytes:
        """Body of the response, an `ImagesResponse`."""
        images = [
            {**picture, "seed": seed}
            for picture, seed in zip(_pictures(result), self._drawing.image.seeds, strict=True)
        ]
        first = self._drawn(self._drawing.image.seed)
        generated = result.generated
        usage = Usage.of(generated.text_tokens, generated.image_tokens)
        return orjson.dumps(
            {"created": _now(), "data": images, **first, **_accounts(generated, usage)}
        )

    def events(self, update: Update) -> Iterator[bytes]:
        """What a stream says of an update."""
        match update:
            case Ticket():
                self._ticket = update
            case Accepted():
                yield self.waiting()
            case ProgressUpdate():
                self._stepped = True
                image, step, total = update.sequence, update.step, update.total
                yield comment(f"step image={image} step={step} total={total}")
            case Preview():
                yield event("image_generation.partial_image", self._partial(update))
            case Result():
                for index in range(len(update.generated.images)):
                    yield event("image_generation.completed", self._completed(index, update))

    def waiting(self) -> bytes:
        """A comment that keeps a silent stream open."""
        if self._stepped or self._ticket is None:
            return comment("drawing")
        return comment(f"queued ahead={self._ticket.ahead}")

    def _partial(self, preview: Preview) -> dict[str, Any]:
        return {
            "type": "image_generation.partial_image",
            "b64_json": _base64(preview.data),
            "created_at": _now(),
            "partial_image_index": preview.index,
            "image_index": preview.image,
            "step": preview.step,
            "total_steps": preview.total,
            **self._drawn(self._drawing.image.seeds[preview.image]),
        }

    def _completed(self, index: int, result: Result) -> dict[str, Any]:
        generated = result.generated
        # The official client counts on it; a URL comes beside it.
        picture = {"b64_json": _base64(generated.images[index])}
        if result.urls is not None:
            picture["url"] = result.urls[index]
        # An image's own, so that a stream's events add up to its request.
        usage = Usage.of(
            generated.text_tokens if index == 0 else 0,
            generated.image_tokens // len(generated.images),
        )
        return {
            "type": "image_generation.completed",
            **picture,
            "created_at": _now(),
            "image_index": index,
            **self._drawn(self._drawing.image.seeds[index]),
            **_accounts(generated, usage),
        }

    def _drawn(self, seed: int) -> dict[str, Any]:
        """Fields of `protocol.Drawn`."""
        drawing = self._drawing
        fields = {
            "background": "opaque",
            "output_format": drawing.output_format,
            "quality": drawing.quality,
            "size": drawing.size,
            "model": self._model,
            "seed": seed,
            "num_inference_steps": drawing.image.steps,
            "guidance_scale": drawing.image.guidance,
        }
        if drawing.safety_identifier is not None:
            fields["safety_identifier"] = drawing.safety_identifier
        return fields


def _accounts(generated: Generated, usage: Usage) -> dict[str, Any]:
    timings = Timings(**{f"{name}_ms": round(ms, 3) for name, ms in generated.stage_ms.items()})
    return {
        "prompt_truncated": generated.prompt_cut,
        "usage": usage.model_dump(),
        "timings": timings.model_dump(),
    }


def _pictures(result: Result) -> Iterator[dict[str, str]]:
    if result.urls is not None:
        yield from ({"url": url} for url in result.urls)
    else:
        yield from ({"b64_json": _base64(data)} for data in result.generated.images)


def _base64(data: bytes) -> str:
    # Python's own takes half of the time of a whole request.
    return pybase64.b64encode_as_string(data)


def _now() -> int:
    return int(time.time())
