"""What clients are sent: responses and events, from what was generated."""

import time
from collections.abc import Iterator
from typing import Any

import orjson
import pybase64

from krea2_server.api.event_stream import comment, event
from krea2_server.api.quality import preset_of
from krea2_server.api.schemas import ImageGenerationRequest, Timings, Usage
from krea2_server.image_service import Preview, Result, Update
from krea2_srt.messages import Generated, GenerateRequest, ProgressUpdate


class ResponseBuilder:
    """Builds the response to one request, or its events.

    Args:
        asked: what the client sent.
        message: what the engine was asked for.
        model: its name.
    """

    def __init__(self, asked: ImageGenerationRequest, message: GenerateRequest, model: str) -> None:
        self._asked = asked
        self._message = message
        self._image = message.image
        self._model = model
        self._stepped = False

    def response(self, result: Result) -> Iterator[bytes]:
        """Body of the response, an `ImagesResponse`, in pieces: each may be many megabytes."""
        generated = result.generated
        usage = Usage.of(generated.text_tokens, generated.image_tokens)
        first = self._metadata(self._image.seed)
        common = {"created": _now(), **first, **_accounts(generated, usage)}
        yield _opened(common) + b',"data":['
        for index, seed in enumerate(self._image.seeds):
            yield b"," if index else b""
            if result.urls is not None:
                yield orjson.dumps({"url": result.urls[index], "seed": seed})
            else:
                yield from _with_picture({"seed": seed}, generated.images[index])
        yield b"]}"

    def events(self, update: Update) -> Iterator[bytes]:
        """What a stream says of an update."""
        match update:
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

    def waiting(self, ahead: int) -> bytes:
        """A comment that begins a stream, and that keeps a silent one open.

        Args:
            ahead: requests that will probably be generated before this one.
        """
        return comment("generating" if self._stepped else f"queued ahead={ahead}")

    def _partial(self, preview: Preview) -> dict[str, Any]:
        return {
            "type": "image_generation.partial_image",
            "created_at": _now(),
            "partial_image_index": preview.index,
            "image_index": preview.image,
            "step": preview.step,
            "total_steps": preview.total,
            **self._metadata(self._image.seeds[preview.image]),
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
            **self._metadata(self._image.seeds[index]),
            **_accounts(generated, usage),
        }

    def _metadata(self, seed: int) -> dict[str, Any]:
        """Fields of `schemas.ImageMetadata`."""
        image = self._image
        fields: dict[str, Any] = {
            "background": "opaque",
            "output_format": self._message.output_format,
            "quality": preset_of(self._asked.quality).label,
            "size": image.size,
            "model": self._model,
            "seed": seed,
            "num_inference_steps": image.steps,
            "guidance_scale": image.guidance,
        }
        if self._asked.warnings:
            fields["warnings"] = self._asked.warnings
        if self._asked.end_user is not None:
            fields["safety_identifier"] = self._asked.end_user
        return fields


def _accounts(generated: Generated, usage: Usage) -> dict[str, Any]:
    adapters = [
        {"name": use.name, "scale": use.scale, "sha256": use.digest} for use in generated.adapters
    ]
    timings = Timings(**{f"{name}_ms": round(ms, 3) for name, ms in generated.stage_ms.items()})
    return {
        **({"lora": adapters} if adapters else {}),
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
