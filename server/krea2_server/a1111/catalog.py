"""What front ends fill their menus with: what there is, and empty lists of what there is not."""

from collections.abc import Iterable, Sequence
from typing import Any

from krea2_server.a1111.answers import SAMPLER, SCHEDULER
from krea2_srt.messages import AdapterInfo

_EMPTY_LISTS = (
    *("latent-upscale-modes", "sd-vae", "sd-modules", "hypernetworks"),
    *("face-restorers", "realesrgan-models", "prompt-styles", "script-info", "extensions"),
)


def catalog(names: Sequence[str]) -> dict[str, Any]:
    """Each list by the last part of its path.

    Args:
        names: what clients may call the model.
    """
    return {
        "samplers": [{"name": SAMPLER, "aliases": [SAMPLER.lower()], "options": {}}],
        "schedulers": [
            {
                "name": SCHEDULER.lower(),
                "label": SCHEDULER,
                "aliases": None,
                "default_rho": -1,
                "need_inner_model": False,
            }
        ],
        "sd-models": [_model(name) for name in names],
        # Front ends put others between this one and the rest.
        "upscalers": [
            {
                "name": "None",
                "model_name": None,
                "model_path": None,
                "model_url": None,
                "scale": 1,
            }
        ],
        "embeddings": {"loaded": {}, "skipped": {}},
        "scripts": {"txt2img": [], "img2img": []},
        # Asked for to see whether the API is there, and open.
        "cmd-flags": {},
        **{name: [] for name in _EMPTY_LISTS},
    }


def adapter_list(adapters: Iterable[AdapterInfo]) -> list[dict[str, Any]]:
    """The adapters, as the webui lists its own; where their files are is the server's affair."""
    return [
        {
            "name": info.name,
            "alias": info.name,
            "path": info.name,
            "metadata": {"title": info.title, "trigger_words": list(info.trigger_words)},
        }
        for info in adapters
        if not info.error
    ]


def options(name: str) -> dict[str, Any]:
    """The webui's options that mean something here; none can be changed.

    Args:
        name: the model's.
    """
    return {
        "sd_model_checkpoint": name,
        "sd_checkpoint_hash": None,
        "sd_vae": "Automatic",
        "CLIP_stop_at_last_layers": 1,
        "samples_format": "png",
    }


def _model(name: str) -> dict[str, Any]:
    return {
        "title": name,
        "model_name": name,
        "hash": None,
        "sha256": None,
        # Front ends expect text; where the server keeps its files is its own affair.
        "filename": name,
        "config": None,
    }
