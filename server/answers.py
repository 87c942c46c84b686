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
from server.image_service import Preview, Result, Step
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
        return orjson.dumps(
            {"created": _now(), "data": images, **first, **_accounts(result.generated)}
        )

    def events(self, step: Step) -> Iterator[bytes]:
        """What a stream says of a step of the request."""
        match step:
            case Ticket():
                self._ticket = step
            case Accepted():
                yield self.waiting()
            case ProgressUpdate():
                self._stepped = True
                yield comment(f"step image={step.sequence} step={step.step} total={step.total}")
            case Preview():
                yield event("image_generation.partial_image", self._partial(step))
            case Result():
                for index, picture in enumerate(_pictures(step)):
                    data = self._completed(index, picture, step)
                    yield event("image_generation.completed", data)

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

    def _completed(self, index: int, picture: dict[str, str], result: Result) -> dict[str, Any]:
        return {
            "type": "image_generation.completed",
            **picture,
            "created_at": _now(),
            "image_index": index,
            **self._drawn(self._drawing.image.seeds[index]),
            **_accounts(result.generated),
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


def _accounts(generated: Generated) -> dict[str, Any]:
    usage = Usage.of(generated.text_tokens, generated.image_tokens)
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
