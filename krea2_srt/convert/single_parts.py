"""Text encoders and VAEs that are single files, as folders of the released layout have them."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from krea2_srt.convert.conversion import Conversion, conversion
from krea2_srt.errors import CheckpointError
from krea2_srt.model.stored.tensor import StoredTensor
from krea2_srt.model.text_encoder_files import MODEL_TYPE, open_text_encoder
from krea2_srt.model.vae_config import CLASS_NAME as VAE_CLASS
from krea2_srt.model.vae_files import open_vae

_VISION = "visual."
_VISION_LAYERS = (5, 11, 17)
_VISION_HEADS = 16
"""Qwen3-VL-4B's; they leave no trace in the weights, and Krea 2 reads text only."""


@dataclass(frozen=True)
class SinglePart:
    """What a folder has in place of a file.

    Attributes:
        config: its ``config.json``.
        conversions: its tensors.
        left_behind: names of those that are not its.
    """

    config: dict[str, Any]
    conversions: list[Conversion]
    left_behind: tuple[str, ...] = ()


def text_encoder_part(file: Path, stack: ExitStack) -> SinglePart:
    """A text encoder, with the names of a ``Qwen3VLModel``.

    Args:
        file: of any names that are read.
        stack: has it open until the tensors are written.

    Raises:
        CheckpointError: it cannot be read, or has no vision tower, which the layout has.
    """
    stored = stack.enter_context(open_text_encoder(file))
    _check_has(stored.tensors, _VISION, "vision tower", file)
    written, left = [], []
    for name, source in stored.tensors.items():
        if name.startswith("lm_head."):
            left.append(f"{file.name}: {source.key}")
        else:
            released = name if name.startswith(_VISION) else f"language_model.{name}"
            written.append(conversion(released, source))
    config = {
        "architectures": ["Qwen3VLModel"],
        "model_type": MODEL_TYPE,
        "text_config": {**stored.config, "model_type": f"{MODEL_TYPE}_text"},
        "tie_word_embeddings": True,
        "vision_config": _vision_config(stored.tensors, file),
    }
    return SinglePart(config, written, tuple(left))


def vae_part(file: Path, stack: ExitStack) -> SinglePart:
    """A VAE, with Diffusers' names.

    Args:
        file, stack: see `text_encoder_part`.

    Raises:
        CheckpointError: it cannot be read, or has no encoder half, which the layout has.
    """
    stored = stack.enter_context(open_vae(file))
    config, tensors = stored.config, stored.tensors
    _check_has(tensors, "encoder.", "encoder half", file)
    values = {
        "_class_name": VAE_CLASS,
        "attn_scales": [],
        "base_dim": config.base_dim,
        "dim_mult": config.dim_mult,
        "dropout": 0.0,
        "latents_mean": config.latents_mean,
        "latents_std": config.latents_std,
        "num_res_blocks": config.num_res_blocks,
        "temperal_downsample": config.temporal_downsample,
        "z_dim": config.z_dim,
    }
    return SinglePart(values, [conversion(name, source) for name, source in tensors.items()])


def _check_has(tensors: Mapping[str, StoredTensor], prefix: str, what: str, file: Path) -> None:
    if not any(name.startswith(prefix) for name in tensors):
        raise CheckpointError(
            f"{file}: has no {what}, which a folder in the released layout has: name one that "
            "has it, or write the transformer alone with --layout file"
        )


def _vision_config(tensors: Mapping[str, StoredTensor], file: Path) -> dict[str, Any]:
    """Sizes of the vision tower by its tensors."""

    def shape(name: str) -> tuple[int, ...]:
        return tensors[f"{_VISION}{name}.weight"].shape

    def count(prefix: str) -> int:
        start = f"{_VISION}{prefix}."
        return len({n[len(start) :].split(".")[0] for n in tensors if n.startswith(start)})

    try:
        width, channels, frames, patch, _ = shape("patch_embed.proj")
        out, merged = shape("merger.linear_fc2")
        read = count("deepstack_merger_list")
        return {
            "deepstack_visual_indexes": _VISION_LAYERS if read == 3 else tuple(range(read)),
            "depth": count("blocks"),
            "hidden_size": width,
            "in_channels": channels,
            "intermediate_size": shape("blocks.0.mlp.linear_fc1")[0],
            "model_type": f"{MODEL_TYPE}_vision",
            "num_heads": _VISION_HEADS,
            "num_position_embeddings": shape("pos_embed")[0],
            "out_hidden_size": out,
            "patch_size": patch,
            "spatial_merge_size": round((merged / width) ** 0.5),
            "temporal_patch_size": frames,
        }
    except KeyError as missing:
        raise CheckpointError(f"{file}: tensor {missing} of the vision tower is missing") from None
    except (ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{file}: not Qwen3-VL's vision tower: {error}") from None
