"""From a client's request to the engine's: defaults filled in, everything checked."""

import secrets

from krea2_server.api.quality import (
    automatic_size,
    check_aspect,
    parse_size,
    preset_of,
    steps_of,
)
from krea2_server.api.schemas import ImageGenerationRequest
from krea2_server.errors import field_name, invalid
from krea2_srt.errors import RequestError
from krea2_srt.messages import GenerateRequest, ModelInfo
from krea2_srt.request import ImageRequest

# Where a client has given a size, it has given no sides.
_BY_SIZE = {"width": "size", "height": "size"}

_RANDOM_SEEDS = 2**32
"""Random seeds stay below, so that every JSON parser keeps them."""


def resolve(
    request: ImageGenerationRequest,
    request_id: str,
    model: ModelInfo,
    *,
    max_n: int,
    max_prompt: int,
) -> GenerateRequest:
    """Fill in what a request leaves open, and check the whole.

    Args:
        request_id: what the engine is to call it.
        max_n, max_prompt: this server's own limits.

    Raises:
        ApiError: 400, naming the field.
    """
    _refuse_impossible(request)
    preset = preset_of(request.quality)
    steps, guidance = request.num_inference_steps, request.guidance_scale
    n = request.n or 1
    if n > max_n:
        raise invalid("n", f"n: must be between 1 and {max_n}, got {n}")
    for field in ("prompt", "negative_prompt"):
        if len(getattr(request, field) or "") > max_prompt:
            raise invalid(field, f"{field}: must have at most {max_prompt} characters")
    width, height = _size(request) or automatic_size(preset, model)
    image = ImageRequest(
        prompt=request.prompt,
        width=width,
        height=height,
        steps=steps_of(preset, model) if steps is None else steps,
        guidance=model.default_guidance if guidance is None else guidance,
        negative_prompt=request.negative_prompt or "",
        seed=secrets.randbelow(_RANDOM_SEEDS) if request.seed is None else request.seed,
        num_images=n,
    )
    if request.negative_prompt and not image.guidance:
        raise invalid("negative_prompt", "negative_prompt: has no effect while guidance_scale is 0")
    try:
        image.check(model.limits)
    except RequestError as error:
        by_sides = request.width is not None
        name = error.field if by_sides else _BY_SIZE.get(error.field, error.field)
        name = field_name(name)
        raise invalid(name, f"{name}: {error.message}") from None
    check_aspect(width, height, _longer_side(request))
    return GenerateRequest(
        request_id,
        image,
        output_format=request.output_format or "png",
        quality=100 if request.output_compression is None else request.output_compression,
        priority=request.priority or 0,
        deadline_s=None if request.deadline_ms is None else request.deadline_ms / 1e3,
        progress=bool(request.stream),
        previews=request.partial_images or 0,
    )


def _size(request: ImageGenerationRequest) -> tuple[int, int] | None:
    """Width and height; None is ours to choose."""
    width, height, size = request.width, request.height, request.size
    if width is None and height is None:
        return None if size is None or size == "auto" else parse_size(size)
    if width is None or height is None:
        missing = "width" if width is None else "height"
        raise invalid(missing, f"{missing}: width and height go together")
    if size not in (None, "auto", f"{width}x{height}"):
        raise invalid("size", f"size: {size} is not width x height, {width}x{height}")
    return width, height


def _longer_side(request: ImageGenerationRequest) -> str:
    """The field that says it."""
    if request.width is None or request.height is None:
        return "size"
    return "width" if request.width >= request.height else "height"


def _refuse_impossible(request: ImageGenerationRequest) -> None:
    lossless = request.output_format in (None, "png")
    if lossless and request.output_compression not in (None, 100):
        raise invalid(
            "output_compression", "output_compression: must be 100 for png, which loses nothing"
        )
    if request.partial_images and not request.stream:
        raise invalid("partial_images", "partial_images: needs stream")
