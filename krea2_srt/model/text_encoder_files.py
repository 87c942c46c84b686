"""The files of a Qwen3-VL text encoder: a folder as transformers writes it, or a single file.

Single files are ComfyUI's ``qwen3vl_4b_*.safetensors`` and the like. They hold the same tensors by
names that differ in what is put before them, and mostly no config.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from krea2_srt.errors import CheckpointError
from krea2_srt.model.json_files import parse_json
from krea2_srt.model.part_files import stated_config
from krea2_srt.model.releases import WEIGHTS
from krea2_srt.model.stored.files import open_files
from krea2_srt.model.stored.prefixes import unprefixed
from krea2_srt.model.stored.tensor import StoredTensor, renamed, shapes_of
from krea2_srt.model.weights import checkpoint_files

MODEL_TYPE = "qwen3_vl"

# Before a name of the text model, in any order: where transformers keeps it in a Qwen3VLModel, in
# a Qwen3VLForConditionalGeneration, in a Qwen3ForCausalLM, and where ComfyUI keeps all of these.
_PREFIXES = (
    "text_encoders.",
    "text_encoder.",
    "cond_stage_model.",
    "qwen3vl_4b.",
    "transformer.",
    "module.",
    "language_model.",
    "model.",
)

_LARGEST_HEAD = 1024
"""Channels. RoPE's frequencies are computed before any tensor's shape is compared."""

_VISION = "visual."
_IN_LAYER = re.compile(r"layers\.([0-9]{1,3})\.(.+)", re.DOTALL)

_OTHERS = (
    ("text_fusion.", "a Krea 2 transformer"),
    ("txtfusion.", "a Krea 2 transformer"),
    ("transformer_blocks.", "a diffusion transformer"),
    ("decoder.up", "a VAE"),
    ("token_embd.", "a file with llama.cpp's names of tensors"),
    ("text_model.encoder.", "a CLIP"),
    ("encoder.block.", "a T5"),
    (".linear_attn.", "a Qwen3.5"),
    (".mlp.experts.", "a mixture of experts"),
    (".pre_feedforward_layernorm.", "a Gemma"),
)
"""Parts of names, and the models that have them."""


@dataclass(frozen=True)
class StoredTextEncoder:
    """The open files of a text encoder.

    Attributes:
        config: sizes of its text model, as transformers names them.
        tensors: by the names of a ``Qwen3VLTextModel``, and what else there is, such as the vision
            tower.
        notes: see `StoredFiles`.
    """

    config: dict[str, Any]
    tensors: Mapping[str, StoredTensor]
    notes: tuple[str, ...]


@contextmanager
def open_text_encoder(path: Path) -> Iterator[StoredTextEncoder]:
    """Open a text encoder; only headers are read until a tensor is.

    Args:
        path: a folder with a ``config.json`` and ``model*.safetensors``, or a single file.

    Raises:
        CheckpointError: missing or damaged files, or another model.
    """
    config = None if path.is_file() else _folder_config(path)
    with open_files(checkpoint_files(path, WEIGHTS["text_encoder"])) as opened:
        tensors = renamed(opened.tensors, lambda name: unprefixed(name, _PREFIXES), path)
        if config is None:
            config = _file_config(path, opened.metadata, tensors)
        yield StoredTextEncoder(config, tensors, opened.notes)


def text_config(path: Path) -> dict[str, Any]:
    """The config of what `open_text_encoder` opens; of a folder nothing else is read.

    Raises:
        CheckpointError: see `open_text_encoder`.
    """
    if not path.is_file():
        return _folder_config(path)
    with open_text_encoder(path) as stored:
        return stored.config


def may_be_there(name: str, needed: Mapping[str, object], layers: int) -> bool:
    """Whether a tensor that is not read is one that a Qwen3-VL has.

    Args:
        name: without prefixes.
        needed: names of what is read.
        layers: that are read, of more.
    """
    if name.startswith((_VISION, "lm_head.")) or name == "norm.weight":
        return True
    match = _IN_LAYER.fullmatch(name)
    return match is not None and int(match[1]) >= layers and f"layers.0.{match[2]}" in needed


def _folder_config(folder: Path) -> dict[str, Any]:
    return parse_json(folder / "config.json", _parse)


def _parse(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"model_type is {config.get('model_type')!r}, expected {MODEL_TYPE!r}"
        )
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise CheckpointError("no text_config in it")
    head, eps = text.get("head_dim"), text.get("rms_norm_eps", 1e-6)
    if isinstance(head, int) and not 0 < head <= _LARGEST_HEAD:
        raise CheckpointError(f"head_dim must be from 1 to {_LARGEST_HEAD}, got {head!r}")
    if isinstance(eps, float) and not 0 < eps < math.inf:
        raise CheckpointError(f"rms_norm_eps must be a positive number, got {eps!r}")
    return text


def _file_config(
    file: Path, metadata: Mapping[str, str], tensors: Mapping[str, StoredTensor]
) -> dict[str, Any]:
    shapes = shapes_of(tensors)
    if other := _other_model(shapes):
        raise CheckpointError(f"{file}: is {other}, Krea 2 needs Qwen3-VL-4B")
    stated = stated_config(file, metadata, lambda c: c.get("model_type") == MODEL_TYPE, _parse)
    if stated is not None:
        return stated
    # A Qwen3-4B has the same tensors in the same shapes, but other weights and another RoPE.
    vision = any(name.startswith(_VISION) for name in tensors)
    if not vision and not any("language_model." in tensor.key for tensor in tensors.values()):
        raise CheckpointError(
            f"{file}: may be a Qwen3-VL or a Qwen3, which Krea 2 cannot use, and nothing in it "
            "says which: give a file with the vision tower, as qwen3vl_4b_bf16.safetensors has "
            "it, or put the config.json of the Qwen3-VL beside it"
        )
    try:
        return config_from_shapes(shapes)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None


def _other_model(shapes: Mapping[str, object]) -> str | None:
    """What a file is that is no Qwen3-VL, where its names tell."""
    for part, model in _OTHERS:
        if any(part in name for name in shapes):
            return model
    attention = "layers.0.self_attn."
    if f"{attention}q_proj.bias" in shapes:
        vision = any(name.startswith(_VISION) for name in shapes)
        return "a Qwen2.5-VL or Qwen2-VL" if vision else "a Qwen2.5 or Qwen2"
    if f"{attention}q_proj.weight" in shapes and f"{attention}q_norm.weight" not in shapes:
        return "a language model without q_norm, as Llama and Mistral are"
    return None


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Derive the sizes of a Qwen3-VL's text model from its tensors.

    What leaves no trace in them is the released Qwen3-VL-4B's.

    Args:
        shapes: by name without prefixes.

    Raises:
        CheckpointError: these are not the tensors of a Qwen3-VL.
    """
    layer = "layers.0."
    try:
        vocabulary, width = shapes["embed_tokens.weight"]
        (head,) = shapes[f"{layer}self_attn.q_norm.weight"]
        queries = shapes[f"{layer}self_attn.q_proj.weight"][0]
        keys = shapes[f"{layer}self_attn.k_proj.weight"][0]
        if head % 2 or queries % head or keys % head:
            raise CheckpointError(
                f"not a Qwen3-VL: heads of {head} channels do not make up {queries} and {keys}"
            )
        # RoPE turns pairs of channels: of time, of height and of width. Text has the same position
        # in all three, so how they are divided changes nothing.
        spatial = 5 * (head // 2) // 16
        return {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": shapes[f"{layer}mlp.gate_proj.weight"][0],
            "num_hidden_layers": len(
                {match[1] for match in map(_IN_LAYER.fullmatch, shapes) if match}
            ),
            "num_attention_heads": queries // head,
            "num_key_value_heads": keys // head,
            "head_dim": head,
            "hidden_act": "silu",
            "attention_bias": False,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5_000_000,
                "mrope_interleaved": True,
                "mrope_section": [head // 2 - 2 * spatial, spatial, spatial],
            },
        }
    except KeyError as missing:
        raise CheckpointError(f"not a Qwen3-VL: tensor {missing} is missing") from None
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"not a Qwen3-VL: {error}") from None
