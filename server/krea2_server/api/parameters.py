"""From a client's request to the engine's: defaults filled in, everything checked."""

import secrets
from dataclasses import replace

from krea2_server.adapters import AskedAdapters, refuse_tags
from krea2_server.api.dialects import GUIDANCE_PLUS_ONE
from krea2_server.api.field_errors import FieldError
from krea2_server.api.quality import Preset, automatic_size, preset_of, steps_of
from krea2_server.api.schemas import ImageGenerationRequest
from krea2_server.api.sizes import AUTO, by_ratio, check_aspect, has_ratio, parse_size
from krea2_server.errors import ApiError, field_name, invalid
from krea2_srt.errors import RequestError
from krea2_srt.images import holds_infotext
from krea2_srt.infotext import infotext
from krea2_srt.messages import GenerateRequest, ModelInfo
from krea2_srt.request import ImageRequest, fit_size

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
    default_size: str = AUTO,
    model_name: str = "",
    default_embed_metadata: bool = False,
) -> GenerateRequest:
    """Fill in what a request leaves open, and check the whole.

    Args:
        request_id: what the engine is to call it.
        max_n, max_prompt, default_size, default_embed_metadata: this server's own.
        model_name: what files say that the model is called; by default its path.

    Raises:
        ApiError: 400, naming the field.
    """
    n = request.n or 1
    if n > max_n:
        raise _invalid(request, "n", f"must be between 1 and {max_n}, got {n}")
    for field in ("prompt", "negative_prompt"):
        if len(getattr(request, field) or "") > max_prompt:
            raise _invalid(request, field, f"must have at most {max_prompt} characters")
    asked = asked_adapters(request)
    prompt = asked.add_tags(request.prompt, request.sent_as("prompt"))
    preset = preset_of(request.quality)
    steps = request.num_inference_steps
    width, height = _size(request, preset, model, default_size)
    image = ImageRequest(
        prompt=prompt,
        width=width,
        height=height,
        steps=steps_of(preset, model) if steps is None else steps,
        guidance=_guidance(request, model),
        negative_prompt=request.negative_prompt or "",
        seed=secrets.randbelow(_RANDOM_SEEDS) if request.seed is None else request.seed,
        num_images=n,
    )
    if request.negative_prompt and not image.guidance:
        problem = "has no effect while guidance_scale is 0"
        _no_effect(request, "negative_prompt", problem, problem)
        image = replace(image, negative_prompt="")
    try:
        image.check(model.limits)
    except RequestError as error:
        by_sides = request.width is not None
        name = error.field if by_sides else _BY_SIZE.get(error.field, error.field)
        raise _invalid(request, field_name(name), error.message) from None
    check_aspect(width, height, request.sent_as(_longer_side(request)))
    output_format = request.output_format or "png"
    compression, previews = request.output_compression, request.partial_images or 0
    if output_format == "png" and compression not in (None, 100):
        problem = "must be 100 for png, which loses nothing"
        _no_effect(request, "output_compression", problem, "has no effect on png")
        compression = None
    if previews and not request.stream:
        _no_effect(request, "partial_images", "needs stream", "has no effect without stream")
        previews = 0
    named = model_name or model.path
    told = replace(image, adapters=asked.longest)
    embeds = _embeds(request, told, output_format, named, default_embed_metadata)
    return GenerateRequest(
        request_id,
        image,
        output_format=output_format,
        quality=100 if compression is None else compression,
        priority=request.priority or 0,
        deadline_s=None if request.deadline_ms is None else request.deadline_ms / 1e3,
        progress=bool(request.stream),
        previews=previews,
        infotext_model=named if embeds else "",
        adapters=asked.frozen,
    )


def asked_adapters(request: ImageGenerationRequest) -> AskedAdapters:
    """The adapters of a request's fields; those of its prompt are not among them.

    Raises:
        ApiError: 400, naming the field.
    """
    asked = AskedAdapters()
    if request.model_adapter is not None:
        asked.add(request.model_adapter, None, request.sent_as("model"))
    for one in request.lora or ():
        asked.add(one.name, one.scale, request.sent_as("lora"))
    if request.negative_prompt:
        refuse_tags(request.negative_prompt, request.sent_as("negative_prompt"))
    return asked


def _invalid(request: ImageGenerationRequest, field: str, problem: str) -> ApiError:
    name = request.sent_as(field)
    return invalid(name, f"{name}: {problem}")


def _no_effect(request: ImageGenerationRequest, field: str, problem: str, warning: str) -> None:
    """Refuse a value that would change nothing, or say so in the answer."""
    if not request.is_lenient:
        raise _invalid(request, field, problem)
    request.warnings.append(f"{request.sent_as(field)}: {warning}")


def _embeds(
    request: ImageGenerationRequest,
    image: ImageRequest,
    output_format: str,
    model_name: str,
    by_default: bool,
) -> bool:
    """Whether files say how they were generated."""
    asked = request.embed_metadata
    if not (by_default if asked is None else asked):
        return False
    texts = [infotext(single, model_name) for single in image.singles()]
    if all(holds_infotext(output_format, text) for text in texts):
        return True
    name = request.sent_as("embed_metadata")
    problem = f"the prompts are too long for the metadata of {output_format}; png holds them"
    if asked:
        raise _invalid(request, "embed_metadata", problem)
    # Nobody has asked for this one: it is still worth its picture.
    request.warnings.append(f"{name}: has no effect; {problem}")
    return False


def _guidance(request: ImageGenerationRequest, model: ModelInfo) -> float:
    guidance = request.guidance_scale
    if guidance is None:
        return model.default_guidance
    if guidance and model.distilled and request.is_lenient:
        name = request.sent_as("guidance_scale")
        if name in GUIDANCE_PLUS_ONE:
            # Front ends send 7 by default, whatever the model.
            request.warnings.append(f"{name}: is off; this model is distilled to need no guidance")
            return 0.0
        request.warnings.append(f"{name}: is applied, though this model is distilled to need none")
    return guidance


def _size(
    request: ImageGenerationRequest, preset: Preset, model: ModelInfo, default_size: str
) -> tuple[int, int]:
    """Width and height, in the grid where the request may be off it."""
    width, height, size = request.width, request.height, request.size
    if width is None and height is None:
        asked = default_size if size is None else size
        return _by_size(request, asked, preset, model)
    if width is None or height is None:
        missing = "width" if width is None else "height"
        raise _invalid(request, missing, "width and height go together")
    is_same = size in (None, AUTO, f"{width}x{height}")
    if request.is_lenient and size and ":" in size:
        is_same = has_ratio(width, height, size)
    if not is_same:
        raise _invalid(request, "size", f"{size} is not width x height, {width}x{height}")
    return _fitted(request, width, height, model)


def _by_size(
    request: ImageGenerationRequest, size: str, preset: Preset, model: ModelInfo
) -> tuple[int, int]:
    if size == AUTO:
        return automatic_size(preset, model)
    if request.is_lenient and ":" in size:
        side, _ = automatic_size(preset, model)
        name = request.sent_as("size")
        try:
            return by_ratio(size, side, name)
        except FieldError as error:
            raise invalid(name, str(error)) from None
    return _fitted(request, *parse_size(size), model)


def _fitted(
    request: ImageGenerationRequest, width: int, height: int, model: ModelInfo
) -> tuple[int, int]:
    if not request.is_lenient:
        return width, height
    fitted = fit_size(width, height, model.limits)
    if fitted != (width, height):
        name = request.sent_as("size" if request.width is None else "width")
        made = "x".join(map(str, fitted))
        request.warnings.append(f"{name}: {width}x{height} is generated as {made}")
    return fitted


def _longer_side(request: ImageGenerationRequest) -> str:
    """The field that says it."""
    if request.width is None or request.height is None:
        return "size"
    return "width" if request.width >= request.height else "height"
