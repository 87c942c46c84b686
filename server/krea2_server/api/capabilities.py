"""What a client may ask of the model, as /v1/models says it: what its requests are held to."""

from typing import get_args

from krea2_server.api.lenient import request_model
from krea2_server.api.parameters import resolve
from krea2_server.api.quality import PRESETS, automatic_size, steps_of
from krea2_server.api.schemas import (
    MAX_PARTIAL_IMAGES,
    MAX_PROMPT,
    ModelCapabilities,
    OutputFormat,
    QualityCapabilities,
    ResponseFormat,
)
from krea2_server.api.sizes import MAX_ASPECT
from krea2_server.errors import ApiError
from krea2_server.keys import Client
from krea2_server.settings import Settings
from krea2_srt.engine.engine import MAX_DEADLINE_S, MAX_PRIORITY
from krea2_srt.messages import ModelInfo
from krea2_srt.request import SIZE_MULTIPLE


def capabilities(
    model: ModelInfo, settings: Settings, client: Client, *, stores: bool, moderates: bool
) -> ModelCapabilities:
    """What this client may ask.

    Args:
        stores: whether images can have URLs.
        moderates: whether content is checked, so that less of it is a right.
    """
    limits = model.limits
    formats = get_args(ResponseFormat)
    return ModelCapabilities(
        default_steps=model.default_steps,
        default_guidance=model.default_guidance,
        trained_side=model.trained_side,
        max_n=min(settings.max_n, limits.max_images),
        max_side=limits.max_side,
        max_pixels=limits.max_pixels,
        max_steps=limits.max_steps,
        max_guidance=limits.max_guidance,
        size_multiple=SIZE_MULTIPLE,
        max_aspect=MAX_ASPECT,
        default_size=_default_size(model, settings),
        max_prompt=min(settings.max_prompt, limits.max_prompt, MAX_PROMPT),
        qualities={
            name: QualityCapabilities(
                num_inference_steps=steps_of(preset, model),
                size="x".join(map(str, automatic_size(preset, model))),
            )
            for name, preset in PRESETS.items()
        },
        output_formats=list(get_args(OutputFormat)),
        response_formats=[name for name in formats if stores or name != "url"],
        default_response_format=settings.default_response_format,
        default_embed_metadata=settings.default_embed_metadata,
        stream=True,
        max_partial_images=MAX_PARTIAL_IMAGES,
        moderation=["auto", "low"] if client.low_moderation or not moderates else ["auto"],
        min_priority=-MAX_PRIORITY,
        max_priority=client.max_priority,
        max_deadline_ms=MAX_DEADLINE_S * 1e3,
        requests_per_minute=client.requests_per_minute or None,
        max_concurrent=client.max_concurrent or None,
    )


def _default_size(model: ModelInfo, settings: Settings) -> str | None:
    """The size of a request that says nothing of it; None if the server's default is impossible."""
    asked = request_model(settings.accept, any_fields=False).model_validate({"prompt": "x"})
    try:
        message = resolve(
            asked, "", model, max_n=1, max_prompt=1, default_size=settings.default_size
        )
    except ApiError:
        return None
    return message.image.size
