"""What front ends send to txt2img beside our words: tables, by the rule of `api.dialects`.

A1111 itself passes over fields that it does not know, so its front ends send those of its forks and
extensions too: here they are named in the answer. What is the point of a request and cannot be done
is refused.
"""

from typing import Any

from krea2_server.api.dialects import NoEffect

_IMAGES = "input images are not served yet"
_SCRIPTS = "there are no scripts here"
_RESIZED_NOISE = "noise is sampled at the size that is asked for"

REFUSED = {
    # name: why, of fields that ask for another picture as soon as they ask for anything.
    "enable_hr": "there is no second pass; ask for the final width and height",
    "init_images": _IMAGES,
    "mask": _IMAGES,
    "image": _IMAGES,
    "alwayson_scripts": _SCRIPTS,
    "script_name": _SCRIPTS,
    "subseed_strength": "pictures between two seeds are not made",
    "seed_resize_from_w": _RESIZED_NOISE,
    "seed_resize_from_h": _RESIZED_NOISE,
    "refiner_checkpoint": "there is one model",
    "infotext": "it is not read; send its values as fields",
    "control": _IMAGES,
    "controlnet_units": _IMAGES,
    "ip_adapter": _IMAGES,
    "stream": "the answer is one piece; POST /v1/images/generations streams",
}

_NO_SAMPLER_SETTINGS = "Euler over the checkpoint's own schedule has no such setting"

NO_EFFECT = {
    "styles": NoEffect("there are no styles here", ([], "")),
    "save_images": NoEffect("images are not kept here"),
    "force_task_id": NoEffect("progress is that of all requests of a key", ()),
    "clip_skip": NoEffect("it belongs to other models", (0, 1, -1)),
    "response_format": NoEffect("images are base64 text here", ("b64_json", "base64", "b64")),
    "partial_images": NoEffect("there are no previews here", (0,)),
    "s_churn": NoEffect(_NO_SAMPLER_SETTINGS, (0,)),
    "s_tmin": NoEffect(_NO_SAMPLER_SETTINGS, (0,)),
    "s_tmax": NoEffect(_NO_SAMPLER_SETTINGS, (0, "inf")),
    "s_noise": NoEffect(_NO_SAMPLER_SETTINGS, (0, 1)),
    "s_min_uncond": NoEffect(_NO_SAMPLER_SETTINGS, (0,)),
}

ASK_NOTHING = frozenset(
    {
        # Of a second pass, a script, another seed: those are refused where they are asked for.
        *("hr_scale", "hr_upscaler", "hr_second_pass_steps", "hr_resize_x", "hr_resize_y"),
        *("hr_checkpoint_name", "hr_sampler_name", "hr_scheduler", "hr_additional_modules"),
        *("hr_prompt", "hr_negative_prompt", "hr_cfg", "hr_distilled_cfg"),
        *("denoising_strength", "firstphase_width", "firstphase_height"),
        *("script_args", "subseed", "refiner_switch_at"),
        # Nothing is saved, and no setting outlives its request.
        *("do_not_save_samples", "do_not_save_grid", "override_settings_restore_afterwards"),
        # SillyTavern sends its own request on: where it went, and with which credentials.
        *("url", "auth"),
    }
)
"""Fields that are passed over in silence, whatever they are."""

OPTIONS_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    # Options of the webui, in ``override_settings``: values that ask for nothing.
    "CLIP_stop_at_last_layers": (0, 1),
    "sd_vae": ("", "automatic", "none"),
    "sd_hypernetwork": ("", "none"),
    "eta_noise_seed_delta": (0,),
    "ddim_discretize": ("uniform",),
    "img2img_fix_steps": (False,),
    "inpainting_mask_weight": (1,),
    "initial_noise_multiplier": (1,),
    "comma_padding_backtrack": (20,),
    "forge_additional_modules": ([],),
}
