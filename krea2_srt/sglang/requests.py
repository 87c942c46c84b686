"""From SGLang's requests to ours: fields, units and checks."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from sglang.multimodal_gen.runtime.pipelines_core.request_utils import normalize_output_seeds
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
from sglang.multimodal_gen.runtime.utils.logging_utils import init_logger
from sglang.multimodal_gen.runtime.utils.perf_logger import RequestMetrics

from krea2_srt.errors import RequestError
from krea2_srt.request import MAX_SEED, MAX_TEXT_TOKENS, ImageRequest, RequestLimits, fit_size
from krea2_srt.sglang.options import HONOURED_FIELDS

logger = init_logger(__name__)

# Where our field has another name than SGLang's.
_SGLANG_FIELDS = {
    "guidance": "guidance_scale",
    "steps": "num_inference_steps",
    "num_images": "num_outputs_per_prompt",
}

# Fields that SGLang fills in by itself, whatever the client asked, or that its own Krea 2 never
# reads; neither changes our picture.
_WITHOUT_EFFECT = frozenset(
    [
        "adjust_frames",
        "boundary_ratio",
        "condition_inputs",
        "data_type",
        "enable_sequence_shard",
        "fps",
        "generator_device",
        "guidance_scale_2",
        "num_frames",
        "num_frames_round_down",
        "request_id",
        "supported_resolutions",
        "task_type",
        "teacache_params",
        "x264_preset",
    ]
)

# What leaves the picture alone, where it is not the field's default.
_NEUTRAL = {"cfg_gate_step": 1.0, "max_sequence_length": MAX_TEXT_TOKENS}


def image_requests(batch: Req, limits: RequestLimits) -> list[ImageRequest]:
    """The images of one SGLang request, each as a request for one image.

    SGLang's guidance scale is Krea's plus 1.

    Raises:
        RequestError: naming SGLang's field.
    """
    _refuse_unsupported(batch)
    scale = batch.guidance_scale
    if isinstance(scale, bool) or not isinstance(scale, (int, float, type(None))):
        raise RequestError("guidance_scale", f"must be a number, got {scale!r}")
    prompts = len(batch.prompt) if isinstance(batch.prompt, list) else 1
    if not 1 <= prompts <= limits.max_images:
        raise RequestError("prompt", f"must be 1 to {limits.max_images}, got {prompts}")
    found = []
    width, height = _size(batch, limits)
    for prompt, seeds in _prompts_and_seeds(batch):
        request = ImageRequest(
            prompt=prompt,
            width=width,
            height=height,
            steps=batch.num_inference_steps,
            # Not "scale > 1": a NaN has to reach the check below, not switch guidance off.
            guidance=0.0 if scale is None or scale <= 1 else scale - 1.0,
            negative_prompt=batch.negative_prompt or "",
            num_images=batch.num_outputs_per_prompt,
        )
        try:
            request.check(limits)
            first, *others = seeds()
            counted = [first, *(seed % (MAX_SEED + 1) for seed in others)]
            images = [replace(request, seed=seed, num_images=1) for seed in counted]
            for image in images:
                image.check(limits)
        except RequestError as error:
            raise error.renamed(_SGLANG_FIELDS.get(error.field, error.field)) from None
        found += images
    return found


def _size(batch: Req, limits: RequestLimits) -> tuple[Any, Any]:
    """Width and height; a size off the grid as everywhere else."""
    asked = batch.width, batch.height
    if not all(isinstance(side, int) for side in asked):
        return asked
    size = fit_size(*asked, limits)
    if size != asked:
        logger.warning("krea2-srt: %dx%d is generated as %dx%d", *asked, *size)
    return size


def check_envelope(req: Req) -> None:
    """Check what is around the request itself: an answer needs it.

    Raises:
        RequestError: naming SGLang's field, which then holds something harmless.
    """
    for field, kinds, harmless in (
        ("request_id", (str, type(None)), None),
        ("extra", (dict,), {}),
        ("output_path", (str, type(None)), None),
        ("output_file_name", (str, type(None)), None),
    ):
        value = getattr(req, field, None)
        if not isinstance(value, kinds):
            setattr(req, field, harmless)
            raise RequestError(field, f"has the wrong type, {type(value).__name__}")
    if req.metrics is not None and not isinstance(req.metrics, RequestMetrics):
        req.metrics = None
        raise RequestError("metrics", "must be SGLang's")


def _prompts_and_seeds(batch: Req) -> Iterator[tuple[str, Callable[[], list[int]]]]:
    """Each prompt with what computes its seeds: not before the number of images is checked."""
    prompts = batch.prompt if isinstance(batch.prompt, list) else [batch.prompt]
    seed = 0 if batch.seed is None else batch.seed
    for index, prompt in enumerate(prompts):
        yield prompt, partial(_seeds, seed, batch, len(prompts), index)


def _seeds(seed: int | list[int], batch: Req, num_prompts: int, prompt_index: int) -> list[int]:
    try:
        return normalize_output_seeds(
            seed,
            num_outputs_per_prompt=batch.num_outputs_per_prompt,
            num_prompts=num_prompts,
            prompt_index=prompt_index,
        )
    except (TypeError, ValueError) as error:
        raise RequestError("seed", str(error)) from None


def _refuse_unsupported(batch: Req) -> None:
    """Refuse every field that is set and that we do not know: a request cannot choose another
    implementation, and an answer must not pretend.
    """
    params: Any = batch.sampling_params
    for field in dataclasses.fields(params):
        if field.name in HONOURED_FIELDS or field.name in _WITHOUT_EFFECT:
            continue
        value = getattr(params, field.name, None)
        neutral = _NEUTRAL.get(field.name, field.default)
        # By type too: 0 is not the False that a field may default to.
        if value is None or value is False or value in ("", [], {}):
            continue
        if type(value) is type(neutral) and value == neutral:
            continue
        raise RequestError(
            field.name,
            f"{value!r} is not supported by krea2-srt; start SGLang with KREA2_SRT=off to use "
            "its own Krea 2 implementation",
        )
