"""What txt2img answers: images as base64 text, and twice what is known of them."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import orjson
import pybase64

from krea2_server.a1111.reading import Txt2Img
from krea2_srt import __version__
from krea2_srt.infotext import infotext
from krea2_srt.messages import Generated, GenerateRequest
from krea2_srt.request import ImageRequest

SAMPLER = "Euler"
SCHEDULER = "Automatic"
"""What the webui calls the schedule that is the model's own."""


def txt2img_answer(
    asked: Txt2Img, message: GenerateRequest, generated: Generated, model: str
) -> Iterator[bytes]:
    """JSON in pieces: each may be many megabytes.

    Args:
        message: what the engine was asked for.
        model: its name.
    """
    warnings = [*asked.request.warnings, *_cut(asked, message, generated)]
    said = {"warnings": warnings} if warnings else {}
    yield b'{"images":['
    for index, picture in enumerate(generated.images if asked.send_images else ()):
        yield b',"' if index else b'"'
        yield pybase64.b64encode(picture)
        yield b'"'
    image = replace(message.image, adapters=frozenset(generated.adapters))
    # As the webui does, with the adapters that it names: who sends it again means the same.
    prompts = {"prompt": asked.request.prompt}
    everyones = {"all_prompts": [asked.request.prompt] * image.num_images}
    info = {**_info(image, model), **prompts, **everyones, **said}
    rest = {
        "parameters": {**_parameters(image, asked.send_images), **prompts},
        "info": orjson.dumps(info).decode(),
        **said,
    }
    yield b"]," + orjson.dumps(rest)[1:]


def _cut(asked: Txt2Img, message: GenerateRequest, generated: Generated) -> Iterator[str]:
    """What to say of a prompt that the model has not read to its end."""
    if generated.prompt_cut:
        fields = ["prompt", "negative_prompt"] if message.image.negative_prompt else ["prompt"]
        names = " or ".join(map(asked.request.sent_as, fields))
        yield f"{names}: was cut; the model reads the first 507 tokens"


def _cfg_scale(image: ImageRequest) -> float:
    """The webui's scale, in which 1 is off."""
    return image.guidance + 1


def _parameters(image: ImageRequest, send_images: bool) -> dict[str, Any]:
    """The request as it was understood; nothing of what only the front end knows."""
    return {
        "prompt": image.prompt,
        "negative_prompt": image.negative_prompt,
        "seed": image.seed,
        "steps": image.steps,
        "cfg_scale": _cfg_scale(image),
        "width": image.width,
        "height": image.height,
        "batch_size": image.num_images,
        "n_iter": 1,
        "sampler_name": SAMPLER,
        "scheduler": SCHEDULER,
        "enable_hr": False,
        "restore_faces": False,
        "tiling": False,
        "styles": [],
        "send_images": send_images,
        "save_images": False,
    }


def _info(image: ImageRequest, model: str) -> dict[str, Any]:
    seeds, count = list(image.seeds), image.num_images
    return {
        "prompt": image.prompt,
        "all_prompts": [image.prompt] * count,
        "negative_prompt": image.negative_prompt,
        "all_negative_prompts": [image.negative_prompt] * count,
        "seed": image.seed,
        "all_seeds": seeds,
        "subseed": image.seed,
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": image.width,
        "height": image.height,
        "sampler_name": SAMPLER,
        "cfg_scale": _cfg_scale(image),
        "steps": image.steps,
        "batch_size": count,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": model,
        "sd_model_hash": None,
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": None,
        "extra_generation_params": {"Schedule type": SCHEDULER},
        "index_of_first_image": 0,
        "infotexts": [infotext(single, model) for single in image.singles()],
        "styles": [],
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
        "version": f"krea2-srt {__version__}",
    }
