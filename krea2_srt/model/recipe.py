"""Turbo or Raw: by what a checkpoint says of itself, then by the words of its name."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from krea2_srt.errors import CheckpointError
from krea2_srt.model.json_files import read_json
from krea2_srt.model.part_files import CONFIG
from krea2_srt.model.releases import CLASS_NAME
from krea2_srt.model.stored.gguf_header import gguf_metadata

RECIPES = ("turbo", "raw")
AUTO = "auto"
"""What the checkpoint says, where a recipe can be given."""

IS_DISTILLED = "is_distilled"
"""The field of Diffusers' ``model_index.json`` that is true for Turbo and false for Raw. In a
file's metadata, where all values are texts, it is "true" or "false".
"""

_TITLES = (
    "modelspec.title",
    "modelspec.architecture",
    "ss_base_model_version",
    "general.name",
    "general.finetune",
    "name",
)
"""In a file's metadata: names of a model, as trainers and GGUF write them."""


def is_turbo(
    checkpoint: str,
    *,
    index: Mapping[str, Any],
    transformer: Path,
    replaced: bool,
    names: Sequence[str],
) -> bool:
    """Whether a checkpoint whose recipe nobody gives is Turbo, and not Raw.

    Args:
        checkpoint: as the user names it, for the message.
        index: its ``model_index.json``; empty where it has none.
        transformer: folder or file.
        replaced: whether the transformer is another than the index's, and speaks first.
        names: that it goes by. Only whole words count: "hand_drawn" and "strawberry" say nothing.

    Raises:
        CheckpointError: nothing says it, or what says it is not readable.
    """
    by_index = _flag(index, f"{checkpoint}: model_index.json")
    by_transformer = _said_by(transformer)
    by_names = next((said for name in names if (said := _by_words([name])) is not None), None)
    says = [by_index, by_transformer, by_names]
    if replaced:
        says = [by_transformer, by_names, by_index]
    for said in says:
        if said is not None:
            return said
    raise CheckpointError(
        f"nothing says whether {checkpoint} is Turbo or Raw: give --recipe turbo or --recipe raw "
        "(KREA2_SRT_RECIPE for SGLang's commands)"
    )


def _said_by(transformer: Path) -> bool | None:
    if transformer.is_file():
        metadata = file_metadata(transformer)
        said = _by_config(metadata, transformer)
        return _by_words(metadata.get(key, "") for key in _TITLES) if said is None else said
    config = transformer / "config.json"
    said = _flag(read_json(config), str(config)) if config.is_file() else None
    return _by_index_beside(transformer) if said is None else said


def _by_index_beside(transformer: Path) -> bool | None:
    """What the checkpoint says whose transformer a folder is, be it named alone."""
    index = transformer.parent / "model_index.json"
    values = read_json(index) if index.is_file() else {}
    return _flag(values, str(index)) if values.get("_class_name") == CLASS_NAME else None


def _by_config(metadata: Mapping[str, str], file: Path) -> bool | None:
    if (text := metadata.get(IS_DISTILLED)) is not None:
        if text.lower() not in ("true", "false"):
            raise CheckpointError(
                f"{file}: {IS_DISTILLED} of its metadata must be true or false, got {text!r}"
            )
        return text.lower() == "true"
    try:
        config = json.loads(metadata.get(CONFIG, "{}"))
    except (ValueError, RecursionError):
        return None  # another tool's, and no JSON
    return _flag(config, f"{file}: its metadata") if isinstance(config, dict) else None


def _flag(values: Mapping[str, Any], where: str) -> bool | None:
    value = values.get(IS_DISTILLED)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{where}: {IS_DISTILLED} must be true or false, got {value!r}")
    return value


def _by_words(texts: Iterable[str]) -> bool | None:
    """What words say; None where it is nothing, or both."""
    # "krea2Turbo" and "turboV2" are two words each, as "Krea-2-Turbo" is three.
    apart = (re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text) for text in texts)
    words = {word.lower() for text in apart for word in re.findall(r"[^\W\d_]+", text)}
    found = words & set(RECIPES)
    return "turbo" in found if len(found) == 1 else None


def file_metadata(file: Path) -> Mapping[str, str]:
    """What a safetensors or GGUF file says of itself; nothing of a file in another format.

    Raises:
        CheckpointError: it is damaged.
    """
    if file.suffix == ".gguf":
        return gguf_metadata(file)
    if file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, framework="numpy") as opened:
            metadata: Mapping[str, str] = opened.metadata() or {}
            return metadata
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"weight file {file} is damaged: {error}") from None
