"""From what a user names (a folder, a file, a repo id) to a checkpoint on disk."""

import os
from dataclasses import replace
from pathlib import Path

from krea2_srt.errors import CheckpointError, first_line
from krea2_srt.runner.checkpoint import Krea2Checkpoint, Recipe

RELEASES = {"oss_turbo": "krea/Krea-2-Turbo", "oss_raw": "krea/Krea-2-Raw"}
"""The original code's names, and the repos that hold the same weights."""

TEXT_ENCODER_REPO = "Qwen/Qwen3-VL-4B-Instruct"
VAE_REPO = "Qwen/Qwen-Image"

_FOLDER_PATTERNS = [
    "model_index.json",
    "scheduler/*",
    "text_encoder/*",
    "tokenizer/*",
    "transformer/*",
    "vae/*",
]


def find_checkpoint(
    name: str,
    *,
    distilled: bool | None = None,
    text_encoder: str | None = None,
    vae: str | None = None,
) -> Krea2Checkpoint:
    """Find a checkpoint and download what is not on disk.

    Args:
        name: ``oss_turbo`` or ``oss_raw``, a folder in the released layout, an original single
            ``.safetensors`` file, or a repo id. The first two read the environment variables
            OSS_TURBO and OSS_RAW, as the original code does, before they turn to a repo.
        distilled: Turbo or Raw, for a single file whose name does not say it.
        text_encoder: folder or repo id of a Qwen3-VL-4B with its tokenizer, for single files.
        vae: folder or repo id of the Qwen-Image VAE, for single files.

    Raises:
        CheckpointError: nothing there, or not a Krea 2 checkpoint.
    """
    alias = name if name in RELEASES else None
    if alias is not None:
        name = os.environ.get(alias.upper()) or RELEASES[alias]
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return _single_file(path, alias, distilled, text_encoder, vae)
    for option, value in (("text encoder", text_encoder), ("VAE", vae)):
        if value is not None:
            raise CheckpointError(f"a {option} of its own goes with a single file, not with {name}")
    folder = path if path.is_dir() else _download(name, _FOLDER_PATTERNS)
    checkpoint = Krea2Checkpoint.from_folder(folder)
    if distilled is not None:
        checkpoint = replace(checkpoint, recipe=replace(checkpoint.recipe, distilled=distilled))
    return checkpoint


def _single_file(
    file: Path,
    alias: str | None,
    distilled: bool | None,
    text_encoder: str | None,
    vae: str | None,
) -> Krea2Checkpoint:
    if distilled is None:
        label = (alias or file.stem).lower()
        if ("turbo" in label) == ("raw" in label):
            raise CheckpointError(f"{file}: its name does not say whether it is Turbo or Raw")
        distilled = "turbo" in label
    encoder = _component(text_encoder or TEXT_ENCODER_REPO, ["*.json", "*.safetensors", "*.txt"])
    decoder = _component(vae or VAE_REPO, ["vae/*"])
    tokenizer = encoder if (encoder / "tokenizer_config.json").is_file() else encoder / "tokenizer"
    if not tokenizer.is_dir():
        # The released layout keeps the tokenizer beside the encoder.
        tokenizer = encoder.parent / "tokenizer"
    return Krea2Checkpoint(
        transformer=file,
        text_encoder=encoder,
        tokenizer=tokenizer,
        vae=decoder / "vae" if (decoder / "vae").is_dir() else decoder,
        recipe=Recipe(distilled),
    )


def _component(name: str, patterns: list[str]) -> Path:
    path = Path(os.path.expanduser(name))
    return path if path.is_dir() else _download(name, patterns)


def _download(repo: str, patterns: list[str]) -> Path:
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise CheckpointError(f"checkpoint {repo} does not exist")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except HFValidationError:
        raise CheckpointError(f"checkpoint {repo} does not exist") from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{repo} is neither a folder here nor in the local model cache, "
            "and the model hub cannot be reached"
        ) from None
    except Exception as error:  # a gated or unknown repo, or any way in which networks fail
        raise CheckpointError(f"{repo}: {first_line(error)}") from None
