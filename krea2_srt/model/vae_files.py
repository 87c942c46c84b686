"""The files of a VAE: a folder as Diffusers writes it, or a single file of either naming."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from krea2_srt.errors import CheckpointError
from krea2_srt.model.json_files import parse_json
from krea2_srt.model.part_files import stated_config
from krea2_srt.model.releases import WEIGHTS
from krea2_srt.model.stored.files import open_files
from krea2_srt.model.stored.prefixes import unprefixed
from krea2_srt.model.stored.tensor import StoredTensor, renamed, shapes_of
from krea2_srt.model.vae import VAEDecoder
from krea2_srt.model.vae_config import CLASS_NAMES, VAEConfig
from krea2_srt.model.vae_names import diffusers_name, other_vae, stage_length
from krea2_srt.model.weights import check_weights, checkpoint_files, load_weights

logger = logging.getLogger(__name__)

_PREFIXES = ("first_stage_model.", "vae.", "module.", "model.")


def load_vae(path: Path, device: torch.device, dtype: torch.dtype) -> VAEDecoder:
    """Load the decoder half of a VAE.

    Args:
        path: a folder with ``config.json`` and safetensors, or a single file.
        device: where the weights go.
        dtype: of weights and activations.

    Raises:
        CheckpointError: missing or damaged files, another architecture.
    """
    with open_vae(path) as stored:
        _check(stored, path)
        with torch.device(device):
            vae = VAEDecoder(stored.config, dtype).eval()
        loaded = load_weights(stored.tensors, vae.weight_map())
    if (line := loaded.line(path, stored.notes)) is not None:
        logger.info("%s", line)
    # Convolutions run faster on both kinds of device with channels innermost.
    return vae.to(memory_format=torch.channels_last)


def check_vae(path: Path) -> None:
    """Check all that can be told of a VAE without reading its weights.

    Raises:
        CheckpointError: see `load_vae`.
    """
    with open_vae(path) as stored:
        _check(stored, path)


def vae_config(path: Path) -> VAEConfig:
    """The config of what `load_vae` loads; no weights are read.

    Raises:
        CheckpointError: see `load_vae`.
    """
    if not path.is_file():
        return _folder_config(path)
    with open_vae(path) as stored:
        return stored.config


@dataclass(frozen=True)
class StoredVAE:
    """The open files of a VAE; tensors by Diffusers' names."""

    config: VAEConfig
    tensors: Mapping[str, StoredTensor]
    notes: tuple[str, ...]


@contextmanager
def open_vae(path: Path) -> Iterator[StoredVAE]:
    """Open a VAE; only headers are read until a tensor is.

    Args:
        path: see `load_vae`.

    Raises:
        CheckpointError: see `load_vae`.
    """
    config = None if path.is_file() else _folder_config(path)
    with open_files(checkpoint_files(path, WEIGHTS["vae"])) as opened:
        bare = renamed(opened.tensors, lambda name: unprefixed(name, _PREFIXES), path)
        length = stage_length(bare)
        tensors = renamed(bare, lambda name: diffusers_name(name, length), path)
        if config is None:
            config = _file_config(path, opened.metadata, shapes_of(tensors))
        yield StoredVAE(config, tensors, opened.notes)


def _folder_config(folder: Path) -> VAEConfig:
    return parse_json(folder / "config.json", VAEConfig.from_dict)


def _file_config(
    file: Path, metadata: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> VAEConfig:
    if other := other_vae(shapes):
        raise CheckpointError(f"{file}: is {other}, Krea 2 needs the Qwen-Image VAE or Wan 2.1's")
    stated = stated_config(
        file, metadata, lambda c: c.get("_class_name") in CLASS_NAMES, VAEConfig.from_dict
    )
    if stated is not None:
        return stated
    try:
        return VAEConfig.from_shapes(shapes)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None


def _check(stored: StoredVAE, path: Path) -> None:
    with torch.device("meta"):
        needed = VAEDecoder(stored.config, torch.bfloat16).weight_map()
    check_weights(needed, shapes_of(stored.tensors), path, ignore=_not_needed)


def _not_needed(name: str) -> bool:
    return name.startswith(("encoder.", "quant_conv.")) or ".time_conv." in name
