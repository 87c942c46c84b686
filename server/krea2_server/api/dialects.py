"""What clients and front ends send in other words than OpenAI's API: a table, and how it is read.

The rule: nothing is ignored in silence, and nothing harmless is refused. Each row says whose word
it is, or why it cannot matter here. What changes a picture and cannot be done is in no table: it
is refused by name.
"""

import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from krea2_server.api.adapter_fields import adapters_of
from krea2_server.api.field_errors import FieldError
from krea2_server.api.sizes import merged, size_of, with_resolution
from krea2_server.api.spelling import flag, is_blank, lower, name_of, number, shown, whole

SYNONYMS = {
    # name: our field, and who calls it that.
    "steps": ("num_inference_steps", "A1111, Together, lobe-chat, StepFun"),
    "step": ("num_inference_steps", "LocalAI"),
    "num_steps": ("num_inference_steps", "Cloudflare, scripts"),
    "sample_steps": ("num_inference_steps", "stable-diffusion.cpp"),
    "sampling_steps": ("num_inference_steps", "stable-diffusion.cpp's command line"),
    "inference_steps": ("num_inference_steps", "scripts"),
    "guidance": ("guidance_scale", "Krea's own code, Replicate"),
    "batch_size": ("n", "SiliconFlow, A1111"),
    "batch_count": ("n", "stable-diffusion.cpp"),
    "num_images": ("n", "fal, Krea's own code"),
    "num_images_per_prompt": ("n", "OpenVINO's server, Diffusers"),
    "num_outputs": ("n", "Replicate"),
    "num_outputs_per_prompt": ("n", "SGLang's library"),
    "number_results": ("n", "Runware"),
    "n_samples": ("n", "NovelAI"),
    "quantity": ("n", "Leonardo"),
    "count": ("n", "scripts"),
    "rng_seed": ("seed", "OpenVINO's server"),
    "random_seed": ("seed", "scripts"),
    "generator_seed": ("seed", "scripts"),
    "negative": ("negative_prompt", "scripts"),
    "neg_prompt": ("negative_prompt", "scripts"),
    "n_prompt": ("negative_prompt", "scripts"),
    "positive_prompt": ("prompt", "Runware"),
    "image_size": ("size", "SiliconFlow, fal"),
    "dimensions": ("size", "scripts"),
    "aspect_ratio": ("size", "Replicate, Krea's hosted API, lobe-chat"),
    "image_width": ("width", "Replicate"),
    "image_height": ("height", "Replicate"),
    "format": ("output_format", "scripts"),
    "image_format": ("output_format", "scripts"),
    "output_quality": ("output_compression", "SGLang, Replicate"),
    "jpeg_quality": ("output_compression", "scripts"),
    "loras": ("lora", "fal, Runware, stable-diffusion.cpp"),
    "image_loras": ("lora", "Together"),
    "enable_pnginfo": ("embed_metadata", "A1111"),
}

GUIDANCE_PLUS_ONE = {
    # name of a guidance whose value is Krea's plus 1, so that 1 or less is off: whose.
    "cfg": "SiliconFlow, lobe-chat",
    "cfg_scale": "A1111, StepFun",
    "true_cfg_scale": "SGLang, vLLM-Omni",
    "true_cfg": "scripts",
    "txt_cfg": "stable-diffusion.cpp",
}

NESTED = ("input", "parameters", "extra_body", "extra_params", "extra", "kwargs")
"""Objects whose fields belong into the body: DashScope's and Replicate's, SGLang's and vLLM-Omni's
``extra_params``, Xinference's ``kwargs``; the last two may be JSON text."""

_EXPANSION = "prompts are not expanded here"
_EXACT = "images are never approximated here"
_SAFETY = "the content policy is the server's"
_MEMORY = "the server plans its memory"
_SAMPLER = "Euler over the checkpoint's own schedule is what there is"
_OTHER_MODELS = "it belongs to other models"


@dataclass(frozen=True)
class NoEffect:
    """A field that cannot matter here.

    Attributes:
        reason: why.
        silent: values that ask for nothing, so that nobody need hear of them.
    """

    reason: str
    silent: tuple[Any, ...] = (False, "false")

    def is_asked(self, value: Any) -> bool:
        """Whether a value asks for something; True always does, though it is as good as 1."""
        return lower(value) not in self.silent or value is True


NO_EFFECT = {
    "style": NoEffect("describe the style in the prompt", ("auto",)),
    "complexity": NoEffect(_OTHER_MODELS, ("auto",)),
    "frame_count": NoEffect("only single images are generated", (1,)),
    "frame_duration_ms": NoEffect("only single images are generated", ()),
    "input_fidelity": NoEffect("there is no input image", ()),
    "strength": NoEffect("there is no input image", ()),
    **dict.fromkeys(
        (
            "enhance_prompt",
            "prompt_enhancement",
            "prompt_enhance",
            "prompt_extend",
            "prompt_expansion",
            "enable_prompt_expansion",
            "prompt_upsampling",
            "upsample_prompt",
            "magic_prompt",
            "revise_prompt",
        ),
        NoEffect(_EXPANSION, (False, "false", "off", "none")),
    ),
    **dict.fromkeys(
        ("go_fast", "acceleration", "speed_mode", "enable_teacache", "enable_cache_dit"),
        NoEffect(_EXACT, (False, "false", "none")),
    ),
    **dict.fromkeys(
        ("enable_safety_checker", "disable_safety_checker", "safety_tolerance", "filter_nsfw"),
        NoEffect(_SAFETY, (False, "false")),
    ),
    **dict.fromkeys(("vae_use_slicing", "vae_use_tiling"), NoEffect(_MEMORY)),
    **dict.fromkeys(
        ("sampler", "sampler_name", "sampler_index", "scheduler", "sample_method"),
        NoEffect(_SAMPLER, ("euler", "default", "automatic", "simple", "normal")),
    ),
    **dict.fromkeys(
        ("distilled_cfg_scale", "distilled_guidance", "clip_skip", "eta", "tiling"),
        NoEffect(_OTHER_MODELS),
    ),
    "restore_faces": NoEffect("faces are not restored"),
    "watermark": NoEffect("no watermark is put into images"),
    "generator_device": NoEffect("noise is sampled where the model runs", ()),
    "max_sequence_length": NoEffect("the model reads 512 tokens", (512,)),
    "metadata": NoEffect(
        "requests are not kept here; embed_metadata puts their settings into files", (False,)
    ),
    "sync_mode": NoEffect("answers hold the image, or its URL with response_format"),
}

_WHOLE = {
    *("n", "num_inference_steps", "seed", "width", "height"),
    *("output_compression", "partial_images", "priority"),
}
_LOWER = {"quality", "background", "moderation", "output_format", "response_format"}
_VALUES: dict[str, dict[str, Any]] = {
    "output_format": {"jpg": "jpeg"},
    "response_format": {"base64": "b64_json", "b64": "b64_json"},
    # SGLang's words for it.
    "output_compression": {"maximum": 100, "high": 90, "medium": 55, "low": 35, "default": None},
}

_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


@dataclass
class Translation:
    """A client's body in our words.

    Attributes:
        body: as `ImageGenerationRequest` reads it, but for what it refuses.
        sent_as: what the client called a field of it, where it has another name.
        warnings: what the client should know.
    """

    body: dict[str, Any] = field(default_factory=dict)
    sent_as: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def warn(self, name: str, why: str) -> None:
        """Say of a field why it has no effect."""
        self.warnings.append(f"{name}: has no effect; {why}")


def translate(values: Mapping[str, Any], fields: Mapping[str, Any]) -> Translation:
    """Read a body by the tables.

    Args:
        values: the client's.
        fields: ours, by name.

    Raises:
        FieldError: a field cannot be read, or two of them say different things.
    """
    result = Translation()
    cfg: tuple[str, Any] | None = None
    resolution: Any = None
    for name, value in flattened(values).items():
        known = known_name(name, fields)
        if value is None or (known != "prompt" and is_blank(value)):
            continue
        if known in GUIDANCE_PLUS_ONE:
            cfg = agreed(cfg, name, number(name, value))
        elif known == "resolution":
            resolution = value
        elif known in NO_EFFECT:
            row = NO_EFFECT[known]
            if row.is_asked(value):
                result.warn(name, row.reason)
        elif known in SYNONYMS:
            put(result, SYNONYMS[known][0], name, value, ratio=known == "aspect_ratio")
        else:
            put(result, known, name, value)
    if resolution is not None:
        size = result.body.get("size")
        result.body["size"] = with_resolution(size, resolution, "resolution")
        if size == result.body["size"] != with_resolution(None, resolution, "resolution"):
            result.warn("resolution", f"{result.sent_as.get('size', 'size')} says it already")
    if result.body.get("seed") == -1:
        del result.body["seed"]  # a random one, which the answer names
    if cfg is not None:
        _put_cfg(result, *cfg)
    return result


def flattened(values: Mapping[str, Any]) -> dict[str, Any]:
    """The body with the fields of what is nested in it.

    Raises:
        FieldError: what should be an object is none, or two fields of a name differ.
    """
    flat = {name: value for name, value in values.items() if name not in NESTED}
    for name in NESTED:
        inner = values.get(name)
        if isinstance(inner, str) and inner.strip():
            try:
                inner = orjson.loads(inner)
            except ValueError:
                raise FieldError(name, f"{name}: must be an object, or one as JSON text") from None
        if inner is None or inner == "":
            continue
        if not isinstance(inner, Mapping):
            text = f"{name}: must be an object, got {type(inner).__name__}"
            raise FieldError(name, text)
        inner = dict(inner)
        if "messages" in inner:
            inner["prompt"] = _prompt_of(f"{name}.messages", inner.pop("messages"))
        for key, value in inner.items():
            if key in flat and flat[key] != value:
                where = f"{name}.{key}"
                raise FieldError(where, f"{where}: {shown(value)} is not {key}, {shown(flat[key])}")
            flat[key] = value
    return flat


def _prompt_of(name: str, messages: Any) -> str:
    """The text of DashScope's messages."""
    try:
        parts = [part for message in messages for part in message["content"]]
        return "\n".join(part["text"] for part in parts)
    except (TypeError, KeyError):
        wanted = '[{"role": "user", "content": [{"text": "..."}]}]'
        raise FieldError(name, f"{name}: must be {wanted}") from None


def known_name(name: str, fields: Container[str]) -> str:
    """A field's name as the tables have it, in which ``numInferenceSteps`` is known too.

    Args:
        fields: names that are known beside these tables'.
    """
    snake = _CAMEL.sub("_", name).lower()
    if name in fields:
        return name
    is_known = snake in fields or snake in SYNONYMS or snake in GUIDANCE_PLUS_ONE
    return snake if is_known or snake in NO_EFFECT or snake == "resolution" else name


def put(result: Translation, ours: str, name: str, value: Any, ratio: bool = False) -> None:
    """Set a field of ours from a client's.

    Args:
        name: what the client calls it.

    Raises:
        FieldError: it cannot be read, or another one has said something else.
    """
    converted = _converted(ours, name, value, ratio)
    if converted is None:
        return
    if ours in result.body:
        said = result.body[ours]
        agreed = said == converted if ours != "size" else merged(said, converted)
        if not agreed:
            other = result.sent_as.get(ours, ours)
            raise FieldError(name, f"{name}: {shown(value)} is not {other}, {shown(said)}")
        converted = agreed if ours == "size" else said
    result.body[ours] = converted
    if name != ours:
        result.sent_as[ours] = name


def _converted(ours: str, name: str, value: Any, ratio: bool) -> Any:
    if ours in _LOWER or ours == "output_compression":
        value = lower(value)
    if isinstance(value, str) and value in _VALUES.get(ours, {}):
        return _VALUES[ours][value]
    convert: Callable[[str, Any], Any] | None = None
    if ours == "seed" and isinstance(value, list) and len(value) == 1:
        (value,) = value
    if ours in _WHOLE:
        convert = whole
    elif ours in ("guidance_scale", "deadline_ms"):
        convert = number
    elif ours in ("stream", "embed_metadata"):
        convert = flag
    elif ours == "size":
        return size_of(value, name, is_ratio=ratio)
    elif ours == "lora":
        return adapters_of(name, value) or None
    elif ours in ("user", "safety_identifier"):
        convert = name_of
    return value if convert is None else convert(name, value)


def agreed(said: tuple[str, Any] | None, name: str, value: Any) -> tuple[str, Any]:
    """A field's name and value, which another spelling of it may have said before.

    Raises:
        FieldError: something else was said.
    """
    if said is not None and said[1] != value:
        raise FieldError(name, f"{name}: {shown(value)} is not {said[0]}, {shown(said[1])}")
    return name, value


def _put_cfg(result: Translation, name: str, value: Any) -> None:
    if "guidance_scale" in result.body:
        result.warn(name, "guidance_scale is there too")
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # What is no number reaches the check, as a NaN does.
    result.body["guidance_scale"] = (0.0 if value <= 1 else value - 1) if is_number else value
    result.sent_as["guidance_scale"] = name
