"""From what a user names (a folder, a file, a repo id) to a checkpoint on disk."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from krea2_srt.errors import CheckpointError
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.model.downloads import download
from krea2_srt.model.parts import PARTS, CheckpointSource, find_parts
from krea2_srt.model.releases import WEIGHTS
from krea2_srt.model.weights import checkpoint_files

# Beside what is needed lie pictures, other models, and the same weights again as one file.
_COMPONENTS = {
    "transformer": ("config.json", "diffusion_pytorch_model*", "transformer/*"),
    "text_encoder": (
        *("config.json", "model*.safetensors", "model.safetensors.index.json"),
        *("tokenizer*", "vocab.json", "merges.txt", "text_encoder/*"),
    ),
    "vae": ("config.json", "diffusion_pytorch_model*", "vae/*"),
}
"""Files of a repo with one part."""


@dataclass(frozen=True)
class ModelHub:
    """Repos of the model hub; see `krea2_srt.model.parts.Repos`.

    Attributes:
        revision: of the checkpoint's repo; None is its main branch.
        cached: whether a checkpoint that is whole in the local cache is taken as it is.
    """

    revision: str | None = None
    cached: bool = False

    def layout(self, repo: str, without: Collection[str]) -> Path:
        if self.cached and (folder := _whole_in_cache(repo, self.revision, without)):
            return folder
        return download(repo, layout_patterns(without), self.revision)

    def component(self, repo: str, part: str) -> Path:
        return download(repo, _COMPONENTS[part])


def layout_patterns(without: Collection[str] = ()) -> list[str]:
    """Files of a repo in the released layout that are needed.

    Args:
        without: parts that come from elsewhere.
    """
    folders = (f"{part}/*" for part in PARTS if part not in without)
    return ["model_index.json", "scheduler/*", *folders]


def find_checkpoint(
    name: str,
    *,
    recipe: str | None = None,
    transformer: str | None = None,
    text_encoder: str | None = None,
    vae: str | None = None,
    tokenizer: str | None = None,
    revision: str | None = None,
    cached: bool = False,
) -> Krea2Checkpoint:
    """Find a checkpoint and download what is not on disk.

    Args:
        name: see `CheckpointSource.model`.
        recipe: ``turbo`` or ``raw``, whatever the checkpoint says of itself.
        transformer, text_encoder, vae: a folder, a single file or a repo id, in place of the
            checkpoint's own part.
        tokenizer: its folder.
        revision: of the checkpoint's repo: a branch, a tag or a commit; None is its main branch.
        cached: whether a repo that is whole in the local cache is taken as it is; otherwise the
            hub is asked whether there is a newer one.

    Raises:
        CheckpointError: nothing there, or not a Krea 2 checkpoint, and what to give.
    """
    source = CheckpointSource(
        name, recipe or "auto", transformer or "", text_encoder or "", vae or "", tokenizer or ""
    )
    return Krea2Checkpoint.from_parts(find_parts(source, ModelHub(revision, cached)))


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
    path = Path(name).expanduser()
    return path if path.is_dir() else ModelHub(revision, cached=True).layout(name, ())


def _whole_in_cache(repo: str, revision: str | None, without: Collection[str]) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        patterns = layout_patterns(without)
        found = snapshot_download(
            repo, revision=revision, allow_patterns=patterns, local_files_only=True
        )
        folder = Path(found)
        for part in WEIGHTS.keys() - set(without):
            checkpoint_files(folder / part, WEIGHTS[part])
    except (HFValidationError, LocalEntryNotFoundError, CheckpointError):
        return None
    there = ("model_index.json", "scheduler", *(part for part in PARTS if part not in without))
    return folder if all((folder / name).exists() for name in there) else None
