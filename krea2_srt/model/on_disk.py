"""Which weight files a checkpoint will be loaded from, as far as they are on this machine already.

Found before torch is imported, to be read ahead. What is missing or wrong is left out: whoever
loads the checkpoint says so.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from krea2_srt.model.releases import (
    CLASS_NAME,
    RELEASES,
    TEXT_ENCODER_REPO,
    VAE_REPO,
    WEIGHTS,
)
from krea2_srt.read_ahead import begin

_CONFIGS = {"transformer": "config.json", "text_encoder": "config.json", "vae": "vae/config.json"}
"""A file that is in a part's own repo."""


def weight_files(model: str, revision: str | None = None, **parts: str | None) -> list[Path]:
    """The weight files of a checkpoint, in the order in which they are loaded.

    Args:
        model: a folder in the released layout, a single file, a repo id, ``oss_turbo`` or
            ``oss_raw``; see `krea2_srt.model.hub.find_checkpoint`.
        revision: of the repo.
        parts: a folder, a file or a repo id in place of the checkpoint's own ``transformer``,
            ``text_encoder`` or ``vae``; None is no other.

    Returns:
        Nothing of a checkpoint of another model.
    """
    if model in RELEASES:
        model = os.environ.get(model.upper()) or RELEASES[model]
    path = Path(os.path.expanduser(model))
    found: dict[str, Path | None]
    if os.path.isfile(path):
        defaults = {"text_encoder": TEXT_ENCODER_REPO, "vae": VAE_REPO}
        found = {"transformer": path}
        parts = {**defaults, **{part: name for part, name in parts.items() if name is not None}}
    else:
        folder = path if os.path.isdir(path) else _in_cache(model, "model_index.json", revision)
        if folder is None or _json(folder / "model_index.json").get("_class_name") != CLASS_NAME:
            return []
        found = {part: folder / part for part in WEIGHTS}
    for part, name in parts.items():
        if name is not None:
            own = Path(os.path.expanduser(name))
            found[part] = own if os.path.exists(own) else _in_cache(name, _CONFIGS[part])
    return part_files(found)


def begin_to_read(model: str, revision: str | None = None, **parts: str | None) -> None:
    """Begin to read ahead what `weight_files` finds."""
    begin(weight_files(model, revision, **parts))


def part_files(parts: Mapping[str, Path | None]) -> list[Path]:
    """The weight files of ``transformer``, ``text_encoder`` and ``vae``, in this order.

    Args:
        parts: a file or a folder each; None is not there.
    """
    found = []
    for part, stem in WEIGHTS.items():
        if (path := parts.get(part)) is None:
            continue
        # A whole checkpoint may be given in place of one of its parts.
        folder = path / part if os.path.isdir(path / part) else path
        found += _shards(folder, stem) if os.path.isdir(folder) else [folder]
    return [file for file in found if os.path.isfile(file)]


def _shards(folder: Path, stem: str) -> list[Path]:
    weight_map = _json(folder / f"{stem}.safetensors.index.json").get("weight_map")
    if not isinstance(weight_map, dict):
        return [folder / f"{stem}.safetensors"]
    # A shard lies beside its index.
    return [folder / name for name in sorted({Path(str(n)).name for n in weight_map.values()})]


def _json(file: Path) -> dict[str, Any]:
    """An object, or an empty one where the file has none."""
    with suppress(OSError, ValueError, RecursionError):
        value = json.loads(file.read_bytes())
        if isinstance(value, dict):
            return value
    return {}


def _in_cache(repo: str, file: str, revision: str | None = None) -> Path | None:
    """The folder of a file of a repo in the hub's local cache, or None; asks nobody."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    with suppress(HFValidationError):
        found = try_to_load_from_cache(repo, file, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    return None
