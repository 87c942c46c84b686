"""From SGLang's requests to ours: fields, units and checks."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from sglang.multimodal_gen.runtime.pipelines_core.request_utils import normalize_output_seeds
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req

from krea2_srt.engine.request import ImageRequest, RequestLimits
from krea2_srt.errors import RequestError

# Where our field has another name than SGLang's.
_SGLANG_FIELDS = {
    "guidance": "guidance_scale",
    "steps": "num_inference_steps",
    "num_images": "num_outputs_per_prompt",
}

# Request fields that change the picture or the answer in ways that our runner does not implement.
# They are refused, because a request cannot choose the implementation.
_UNSUPPORTED = (
    "attention_backend_override",
    "cache_dit_params",
    "cfg_gate_step",
    "cfg_normalization",
    "diffusers_kwargs",
    "enable_cache_dit",
    "enable_spectrum",
    "enable_teacache",
    "flow_shift",
    "guidance_rescale",
    "image_path",
    "max_sequence_length",
    "progressive_mode",
    "return_trajectory_decoded",
    "return_trajectory_latents",
    "rollout",
    "skip_softmax_params",
    "spectrum_params",
    "true_cfg_scale",
    "video_path",
)


def image_requests(batch: Req, limits: RequestLimits) -> list[ImageRequest]:
    """The requests in one SGLang request: one, or several that SGLang has merged.

    Each is one prompt with its own seeds. SGLang's guidance scale is Krea's plus 1.

    Raises:
        RequestError: naming SGLang's field.
    """
    _refuse_unsupported(batch)
    found = []
    for prompt, seeds in _prompts_and_seeds(batch):
        scale = batch.guidance_scale
        # Not "scale > 1": a NaN has to reach the check below, not switch guidance off.
        guidance = 0.0 if scale is None or scale <= 1 else scale - 1.0
        for seed in seeds:
            request = ImageRequest(
                prompt=prompt,
                width=batch.width,
                height=batch.height,
                steps=batch.num_inference_steps,
                guidance=guidance,
                negative_prompt=batch.negative_prompt or "",
                seed=seed,
            )
            try:
                request.check(limits)
            except RequestError as error:
                raise error.renamed(_SGLANG_FIELDS.get(error.field, error.field)) from None
            found.append(request)
    return found


def _prompts_and_seeds(batch: Req) -> Iterator[tuple[str, list[int]]]:
    count = batch.num_outputs_per_prompt
    if not isinstance(count, int) or count < 1:
        raise RequestError("num_outputs_per_prompt", f"must be at least 1, got {count!r}")
    prompts = batch.prompt if isinstance(batch.prompt, list) else [batch.prompt]
    # A merged request carries each request's own seed; without it all would share the first's.
    merged = batch.extra.get("dynamic_batch_seeds") if batch.extra else None
    for index, prompt in enumerate(prompts):
        seed = merged[index] if merged is not None else batch.seed
        try:
            yield (
                prompt,
                normalize_output_seeds(
                    0 if seed is None else seed,
                    num_outputs_per_prompt=count,
                    num_prompts=1 if merged is not None else len(prompts),
                    prompt_index=0 if merged is not None else index,
                ),
            )
        except (TypeError, ValueError) as error:
            raise RequestError("seed", str(error)) from None


def _refuse_unsupported(batch: Req) -> None:
    params: Any = batch.sampling_params
    defaults = {f.name: f.default for f in dataclasses.fields(params)}
    for name in _UNSUPPORTED:
        value = getattr(params, name, None)
        if value not in (None, False, defaults.get(name)):
            raise RequestError(
                name,
                f"{value!r} is not supported by krea2-srt; start SGLang with KREA2_SRT=off to use "
                "its own Krea 2 implementation",
            )
