"""The released layout's JSON files, written as Diffusers writes them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from krea2_srt.model.checkpoint import TRAINED_SIDE, SamplingDefaults
from krea2_srt.model.config import CLASS_NAME as DIT_CLASS
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.dit_files import config_dict
from krea2_srt.model.latents import PATCH
from krea2_srt.model.releases import CLASS_NAME
from krea2_srt.model.schedule import ResolutionShift
from krea2_srt.model.text_encoder import DEFAULT_SELECT_LAYERS
from krea2_srt.model.text_encoder_files import MODEL_TYPE
from krea2_srt.model.vae_config import CLASS_NAME as VAE_CLASS
from krea2_srt.model.vae_config import LATENTS_MEAN, LATENTS_STD

TEXT_CONFIG: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5_000_000,
        "mrope_interleaved": True,
        "mrope_section": [24, 20, 20],
    },
}
"""Sizes of Qwen3-VL-4B's text model."""

VAE_CONFIG: dict[str, Any] = {
    "_class_name": VAE_CLASS,
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "latents_mean": LATENTS_MEAN,
    "latents_std": LATENTS_STD,
}
"""Sizes of Qwen-Image's VAE."""


def write_released_configs(folder: Path, distilled: bool) -> None:
    """Write the configs of the released checkpoint, without weights or a tokenizer: enough to plan
    with.

    Args:
        folder: which becomes the checkpoint's.
        distilled: Turbo (True) or Raw (False).
    """
    files = {
        "model_index.json": model_index(SamplingDefaults(distilled)),
        "scheduler/scheduler_config.json": scheduler_config(ResolutionShift()),
        "transformer/config.json": transformer_config(Krea2Config()),
        "text_encoder/config.json": {"model_type": MODEL_TYPE, "text_config": TEXT_CONFIG},
        "vae/config.json": VAE_CONFIG,
    }
    for name, values in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values), encoding="utf-8")
    (folder / "tokenizer").mkdir()


def model_index(
    sampling: SamplingDefaults, select_layers: Sequence[int] = DEFAULT_SELECT_LAYERS
) -> dict[str, Any]:
    """``model_index.json``.

    Args:
        sampling: Turbo's or Raw's.
        select_layers: text encoder hidden states that the DiT reads.
    """
    side = sampling.trained_side
    return {
        "_class_name": CLASS_NAME,
        "_diffusers_version": "0.42.1",
        **({TRAINED_SIDE: side} if side != SamplingDefaults.trained_side else {}),
        "is_distilled": sampling.distilled,
        "patch_size": PATCH,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3VLModel"],
        "text_encoder_select_layers": list(select_layers),
        "tokenizer": ["transformers", "Qwen2TokenizerFast"],
        "transformer": ["diffusers", DIT_CLASS],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }


def transformer_config(config: Krea2Config) -> dict[str, Any]:
    """``transformer/config.json``."""
    released = {"_class_name": DIT_CLASS, **config_dict(config)}
    if config == Krea2Config():
        return released
    # SGLang's own DiT reads these names instead of the released ones; its defaults are Krea 2's.
    return released | {
        "features": config.hidden_size,
        "heads": config.num_attention_heads,
        "kvheads": config.num_key_value_heads,
        "layers": config.num_layers,
        "txtdim": config.text_hidden_dim,
        "txtheads": config.text_num_attention_heads,
        "txtkvheads": config.text_num_key_value_heads,
    }


def scheduler_config(shift: ResolutionShift) -> dict[str, Any]:
    """``scheduler/scheduler_config.json``."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "base_image_seq_len": shift.min_tokens,
        "base_shift": shift.min_mu,
        "max_image_seq_len": shift.max_tokens,
        "max_shift": shift.max_mu,
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "time_shift_type": "exponential",
        "use_dynamic_shifting": True,
    }
