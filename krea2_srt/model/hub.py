"""From what a user names (a folder, a file, a repo id) to a checkpoint on disk."""

import os
from dataclasses import replace
from pathlib import Path

from krea2_srt.errors import CheckpointError, first_line
from krea2_srt.model.checkpoint import Krea2Checkpoint, SamplingDefaults
from krea2_srt.model.releases import RELEASES, TEXT_ENCODER_REPO, VAE_REPO, WEIGHTS
from krea2_srt.model.weights import checkpoint_files

FOLDER_PATTERNS = [
    "model_index.json",
    "scheduler/*",
    "text_encoder/*",
    "tokenizer/*",
    "transformer/*",
    "vae/*",
]
"""Files of a repo that are needed: beside them lie pictures, and the same weights again as one
file.
"""


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
            raise CheckpointError(
                f"a separate {option} is only valid with a single-file checkpoint, not with {name}"
            )
    folder = path if path.is_dir() else _download(name, FOLDER_PATTERNS)
    checkpoint = Krea2Checkpoint.from_folder(folder)
    if distilled is not None:
        checkpoint = replace(checkpoint, sampling=replace(checkpoint.sampling, distilled=distilled))
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
        sampling=SamplingDefaults(distilled),
    )


def _component(name: str, patterns: list[str]) -> Path:
    path = Path(os.path.expanduser(name))
    return path if path.is_dir() else _download(name, patterns)


def released_folder(name: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint in the released layout, downloaded where it is not on disk.

    What is in the local cache whole is used as it is, so that a process that is started again
    needs no hub, and serves the weights that those beside it serve.

    Args:
        name: a folder, or a repo id.
        revision: of the repo: a branch, a tag or a commit; None is its main branch.

    Raises:
        CheckpointError: nothing there, or it cannot be downloaded.
    """
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return path
    folder = _cached(name, revision)
    return folder or _download(name, FOLDER_PATTERNS, revision)


def _cached(repo: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=FOLDER_PATTERNS, local_files_only=True
        )
        checkpoint = Krea2Checkpoint.from_folder(Path(folder))
        for part, stem in WEIGHTS.items():
            checkpoint_files(getattr(checkpoint, part), stem)
    except (HFValidationError, LocalEntryNotFoundError, CheckpointError):
        return None
    return Path(folder)


def _download(repo: str, patterns: list[str], revision: str | None = None) -> Path:
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise CheckpointError(f"checkpoint {repo} does not exist")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except Exception as error:  # a gated or unknown repo, or any way in which networks fail
        raise CheckpointError(hub_failure(repo, error, revision)) from None


def hub_failure(repo: str, error: BaseException, revision: str | None = None) -> str:
    """What an error of the model hub's client means, and what to do about it, in one line.

    Args:
        repo: what was asked for.
        error: as ``huggingface_hub`` raised it.
        revision: of the repo.
    """
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    # What the client found, where it says that it fell back to its cache in vain.
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else None
    answer = cause if isinstance(cause, errors.HfHubHTTPError) else error
    if isinstance(error, errors.HFValidationError):
        return f"checkpoint {repo} does not exist"
    if isinstance(answer, errors.GatedRepoError):
        return (
            f"{repo} is gated: accept its licence on {page}, then run `hf auth login` with a token "
            "of that account, or set HF_TOKEN to it"
        )
    if isinstance(answer, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision}"
    if isinstance(answer, errors.RepositoryNotFoundError):
        return (
            f"checkpoint {repo} does not exist: it is no folder here, and {page} is no repo, or a "
            "private one that needs `hf auth login` or HF_TOKEN"
        )
    if isinstance(answer, errors.HfHubHTTPError):
        status = answer.response.status_code
        if status == 401:
            return f"{repo}: the hub does not know the token in HF_TOKEN or of `hf auth login`"
        return f"{repo}: the hub answers with status {status}: {first_line(answer)}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        whole = "wholly " if isinstance(error, errors.IncompleteSnapshotError) else ""
        reason = " (HF_HUB_OFFLINE is set)" if constants.is_offline_mode() else ""
        return (
            f"{repo} is neither a folder here nor {whole}in the local model cache, "
            f"and the model hub cannot be reached{reason}"
        )
    return f"{repo}: {first_line(error)}"
