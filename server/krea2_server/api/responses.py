"""What clients are sent: responses and events, from what was generated."""

import time
from collections.abc import Iterator
from typing import Any

import orjson
import pybase64

from krea2_server.api.event_stream import comment, event
from krea2_server.api.parameters import GenerationParams
from krea2_server.api.schemas import Timings, Usage
from krea2_server.engine.base import QueuePosition
from krea2_server.image_service import Preview, Result, Update
from krea2_srt.messages import Accepted, Generated, ProgressUpdate


class ResponseBuilder:
    """Builds the response to one request, or its events.

    Args:
        params: what was asked for.
        model: its name.
    """

    def __init__(self, params: GenerationParams, model: str) -> None:
        self._params = params
        self._model = model
        self._position: QueuePosition | None = None
        self._stepped = False

    def response(self, result: Result) -> Iterator[bytes]:
        """Body of the response, an `ImagesResponse`, in pieces: each may be many megabytes."""
        generated = result.generated
        usage = Usage.of(generated.text_tokens, generated.image_tokens)
        first = self._metadata(self._params.image.seed)
        common = {"created": _now(), **first, **_accounts(generated, usage)}
        yield _opened(common) + b',"data":['
        for index, seed in enumerate(self._params.image.seeds):
            yield b"," if index else b""
            if result.urls is not None:
                yield orjson.dumps({"url": result.urls[index], "seed": seed})
            else:
                yield from _with_picture({"seed": seed}, generated.images[index])
        yield b"]}"

    def events(self, update: Update) -> Iterator[bytes]:
        """What a stream says of an update."""
        match update:
            case QueuePosition():
                self._position = update
            case Accepted():
                yield self.waiting()
            case ProgressUpdate():
                self._stepped = True
                image, step, total = update.sequence, update.step, update.total
                yield comment(f"step image={image} step={step} total={total}")
            case Preview():
                data = _with_picture(self._partial(update), update.data)
                yield event("image_generation.partial_image", b"".join(data))
            case Result():
                for index in range(len(update.generated.images)):
                    data = _with_picture(
                        self._completed(index, update), update.generated.images[index]
                    )
                    yield event("image_generation.completed", b"".join(data))

    def waiting(self) -> bytes:
        """A comment that keeps a silent stream open."""
        if self._stepped or self._position is None:
            return comment("generating")
        return comment(f"queued ahead={self._position.ahead}")

    def _partial(self, preview: Preview) -> dict[str, Any]:
        return {
            "type": "image_generation.partial_image",
            "created_at": _now(),
            "partial_image_index": preview.index,
            "image_index": preview.image,
            "step": preview.step,
            "total_steps": preview.total,
            **self._metadata(self._params.image.seeds[preview.image]),
        }

    def _completed(self, index: int, result: Result) -> dict[str, Any]:
        generated = result.generated
        # An image's own, so that a stream's events add up to its request.
        usage = Usage.of(
            generated.text_tokens if index == 0 else 0,
            generated.image_tokens // len(generated.images),
        )
        return {
            "type": "image_generation.completed",
            **({} if result.urls is None else {"url": result.urls[index]}),
            "created_at": _now(),
            "image_index": index,
            **self._metadata(self._params.image.seeds[index]),
            **_accounts(generated, usage),
        }

    def _metadata(self, seed: int) -> dict[str, Any]:
        """Fields of `schemas.ImageMetadata`."""
        params = self._params
        fields = {
            "background": "opaque",
            "output_format": params.output_format,
            "quality": params.quality,
            "size": params.size,
            "model": self._model,
            "seed": seed,
            "num_inference_steps": params.image.steps,
            "guidance_scale": params.image.guidance,
        }
        if params.safety_identifier is not None:
            fields["safety_identifier"] = params.safety_identifier
        return fields


def _accounts(generated: Generated, usage: Usage) -> dict[str, Any]:
    timings = Timings(**{f"{name}_ms": round(ms, 3) for name, ms in generated.stage_ms.items()})
    return {
        "prompt_truncated": generated.prompt_cut,
        "usage": usage.model_dump(),
        "timings": timings.model_dump(),
    }


def _with_picture(values: dict[str, Any], picture: bytes) -> Iterator[bytes]:
    """JSON of an object with a picture in it, which no JSON encoder need look at."""
    yield _opened(values) + b',"b64_json":"'
    # Python's own takes half of the time of a whole request.
    yield pybase64.b64encode(picture)
    yield b'"}'


def _opened(values: dict[str, Any]) -> bytes:
    """JSON of an object that is not empty, without its end."""
    return orjson.dumps(values)[:-1]


def _now() -> int:
    return int(time.time())
