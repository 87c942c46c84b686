"""Repos of the model hub, and what its client's errors mean."""

from collections.abc import Sequence
from pathlib import Path

from krea2_srt.errors import CheckpointError, first_line
from krea2_srt.model.releases import SUFFIXES


def is_repo_id(name: str) -> bool:
    """Whether a name that is nothing on this disk can be a repo's, OWNER/NAME, and no file's."""
    plain = not name.startswith((".", "/", "~")) and not name.endswith(SUFFIXES)
    return plain and name.count("/") == 1


def download(repo: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """The folder of a repo's files in the local cache, with what was not there yet.

    Args:
        repo: its id.
        patterns: of the paths of its files.
        revision: a branch, a tag or a commit; None is the main branch.

    Raises:
        CheckpointError: there is no such repo, or it cannot be downloaded.
    """
    if not is_repo_id(repo):
        raise CheckpointError(f"checkpoint {repo} does not exist")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
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
