"""From what a user names to the parts of a checkpoint on disk: folders, single files, repos.

Without torch: the images server looks here before it starts anything.
"""

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from krea2_srt.errors import CheckpointError
from krea2_srt.model.config import CLASS_NAME as DIT_CLASS
from krea2_srt.model.downloads import is_repo_id
from krea2_srt.model.json_files import read_json
from krea2_srt.model.recipe import AUTO, RECIPES, is_turbo
from krea2_srt.model.releases import (
    CLASS_NAME,
    RELEASES,
    SUFFIXES,
    TEXT_ENCODER_REPO,
    VAE_REPO,
)
from krea2_srt.model.tokenizer_files import check_packaged, tokenizer_beside

PARTS = ("transformer", "text_encoder", "tokenizer", "vae")
"""Folders of the released layout, and what can be given apart from it."""

_FLAGS = {"text_encoder": "text-encoder", "tokenizer": "tokenizer", "vae": "vae"}
_HUB_CACHE = re.compile(r"(?:.*/)?models--(?:[^/]+--)?([^/]+)/snapshots/[^/]+")


class Repos(Protocol):
    """Brings what is in repos to this disk; raises `CheckpointError` where it cannot."""

    def layout(self, repo: str, without: Collection[str]) -> Path:
        """The folder of a checkpoint in the released layout, but for some of its `PARTS`."""

    def component(self, repo: str, part: str) -> Path:
        """The folder of a repo with one part, whether it lies in a folder of that name or not."""


@dataclass(frozen=True)
class CheckpointSource:
    """What a user names.

    Attributes:
        model: ``oss_turbo`` or ``oss_raw``, a folder in the released layout, a single file of the
            transformer, or a repo id. The first two read the environment variables OSS_TURBO and
            OSS_RAW, as the original code does, before they turn to a repo.
        recipe: ``turbo`` or ``raw``; "auto" is what the checkpoint says.
        transformer, text_encoder, vae: a folder, a single file or a repo id, in place of the
            model's own part; "" is that.
        tokenizer: a folder; "" is the one that is found.
        flags: how the flags that name parts are written, for messages.
    """

    model: str
    recipe: str = AUTO
    transformer: str = ""
    text_encoder: str = ""
    vae: str = ""
    tokenizer: str = ""
    flags: str = "--{}"

    @property
    def given(self) -> Mapping[str, str]:
        """The parts that are given apart from the model."""
        return {part: getattr(self, part) for part in PARTS if getattr(self, part)}


@dataclass(frozen=True)
class CheckpointParts:
    """Where the parts lie, and what the released layout says beside them.

    Attributes:
        transformer, text_encoder, vae: each a folder or a single file.
        tokenizer: a folder; None is the one that a package carries.
        turbo: the recipe: Turbo, or Raw.
        index: ``model_index.json``, and `index_file` where it is; empty without one.
        scheduler: ``scheduler_config.json``.
    """

    transformer: Path
    text_encoder: Path
    vae: Path
    tokenizer: Path | None
    turbo: bool
    index: Mapping[str, Any] = field(default_factory=dict)
    index_file: Path | None = None
    scheduler: Mapping[str, Any] = field(default_factory=dict)


def find_parts(source: CheckpointSource, repos: Repos) -> CheckpointParts:
    """Find all parts. Only names and small JSON files are read, and headers of single files.

    Args:
        source: what is named.
        repos: for what is not on this disk.

    Raises:
        CheckpointError: something is not there, or not Krea 2's, and what to give.
    """
    located = _locate(source, repos, source.given)
    layout = located.layout
    scheduler: Mapping[str, Any] = {}
    if layout is not None:
        _check_complete(layout, source.given)
        scheduler = read_json(layout / "scheduler" / "scheduler_config.json")

    def part_of(part: str, default: str) -> Path:
        if layout is not None and part not in source.given:
            return layout / part
        return _component(part, source.given.get(part, default), repos)

    vae = part_of("vae", VAE_REPO)
    text_encoder = part_of("text_encoder", TEXT_ENCODER_REPO)
    return CheckpointParts(
        located.transformer,
        text_encoder,
        vae,
        _tokenizer(source, text_encoder, layout),
        located.turbo,
        located.index,
        layout / "model_index.json" if layout is not None else None,
        scheduler,
    )


@dataclass(frozen=True)
class LocatedTransformer:
    """Where a checkpoint's transformer lies.

    Attributes:
        transformer: a folder or a single file.
        turbo: the recipe: Turbo, or Raw.
        layout: the folder in the released layout that it is of; None of a single file.
        index: that folder's ``model_index.json``; empty without one.
    """

    transformer: Path
    turbo: bool
    layout: Path | None
    index: Mapping[str, Any]


def find_transformer(source: CheckpointSource, repos: Repos) -> LocatedTransformer:
    """Find the transformer alone; the other parts need not be there.

    Args:
        source, repos: see `find_parts`.

    Raises:
        CheckpointError: it is not there, or not Krea 2's, and what to give.
    """
    return _locate(source, repos, {"text_encoder", "tokenizer", "vae"})


def _locate(source: CheckpointSource, repos: Repos, without: Collection[str]) -> LocatedTransformer:
    if source.recipe not in (AUTO, *RECIPES):
        raise CheckpointError(f"recipe: must be turbo or raw, got {source.recipe!r}")
    for part, name in source.given.items():
        flag = source.flags.format(part.replace("_", "-"))
        _check_there(flag, name, repo=part != "tokenizer")
    name = source.model
    if name in RELEASES:
        name = os.environ.get(name.upper()) or RELEASES[name]
    path = _on_disk(name)
    if path is None:
        if not is_repo_id(name):
            raise CheckpointError(f"checkpoint {name} does not exist")
        path = repos.layout(name, without)
    elif not _can_be_part(path):
        raise CheckpointError(f"checkpoint {path} {_NO_PART}")
    layout = path if path.is_dir() and not _is_transformer(path) else None
    index = _read_index(layout) if layout is not None else {}
    own = path if layout is None else layout / "transformer"
    given = source.transformer
    transformer = _component("transformer", given, repos) if given else own
    if source.recipe == AUTO:
        turbo = is_turbo(
            name,
            index=index,
            transformer=transformer,
            replaced=transformer != own,
            names=_names(source, name),
        )
    else:
        turbo = source.recipe == "turbo"
    return LocatedTransformer(transformer, turbo, layout, index)


class NotOnDiskError(Exception):
    """It is in a repo."""


class NoRepos:
    """For who looks at this disk alone."""

    def layout(self, repo: str, without: Collection[str]) -> Path:
        raise NotOnDiskError

    def component(self, repo: str, part: str) -> Path:
        raise NotOnDiskError


def check_on_disk(source: CheckpointSource) -> None:
    """Check all that can be checked without a model hub.

    Raises:
        CheckpointError: see `find_parts`.
    """
    try:
        find_parts(source, NoRepos())
    except NotOnDiskError:
        return


def last_part(name: str) -> str:
    """What a folder, a file or a repo is called: the hub's cache calls a folder by its commit."""
    name = name.rstrip("/")
    if cached := _HUB_CACHE.fullmatch(name):
        return cached[1]
    last = name.rsplit("/", 1)[-1]
    suffix = next((suffix for suffix in SUFFIXES if last.endswith(suffix)), "")
    return last.removesuffix(suffix)


def _names(source: CheckpointSource, name: str) -> list[str]:
    """That a checkpoint goes by, first the one that says most of its transformer."""
    if source.transformer:
        return [last_part(source.transformer)]
    named = [source.model] if source.model in RELEASES else []
    return [*named, last_part(name)]


_NO_PART = f"is neither a folder nor a {' or '.join(SUFFIXES)} file"


def _on_disk(name: str) -> Path | None:
    path = Path(os.path.expanduser(name))
    try:
        return path if path.exists() else None
    except OSError:  # a name that is too long, or a folder that nobody may look into
        return None


def _can_be_part(path: Path) -> bool:
    # Of a pipe's end nobody knows when it comes.
    return path.is_dir() or (path.is_file() and path.suffix in SUFFIXES)


def _check_there(flag: str, name: str, repo: bool) -> None:
    path = _on_disk(name)
    if path is None and not (repo and is_repo_id(name)):
        raise CheckpointError(f"{flag}: {name} does not exist")
    if path is not None and not repo and not path.is_dir():
        raise CheckpointError(f"{flag}: {name} is no folder")
    if path is not None and not _can_be_part(path):
        raise CheckpointError(f"{flag}: {name} {_NO_PART}")


def _component(part: str, name: str, repos: Repos) -> Path:
    """A part by its own name: a file, its folder, or one in the released layout that has it."""
    path = _on_disk(name) or repos.component(name, part)
    inner = path / part
    if path.is_file() or (path / "config.json").is_file() or not inner.is_dir():
        return path
    return inner


def _is_transformer(folder: Path) -> bool:
    """Whether a folder is the transformer's alone, out of a checkpoint's."""
    config = folder / "config.json"
    if not config.is_file() or (folder / "model_index.json").is_file():
        return False
    return read_json(config).get("_class_name") == DIT_CLASS


def _read_index(folder: Path) -> Mapping[str, Any]:
    file = folder / "model_index.json"
    if not file.is_file():
        lying = sorted(one.name for one in folder.iterdir() if one.suffix in SUFFIXES)
        instead = f"; name one of its files instead, {folder / lying[0]}" if lying else ""
        raise CheckpointError(f"{folder} holds no checkpoint: {file} is missing{instead}")
    index = read_json(file)
    if index.get("_class_name") != CLASS_NAME:
        raise CheckpointError(
            f"{file}: _class_name is {index.get('_class_name')!r}, expected {CLASS_NAME!r}"
        )
    return index


def _check_complete(folder: Path, given: Collection[str]) -> None:
    # A tokenizer is looked for, wherever the text encoder is from.
    needed = ("transformer", "text_encoder", "vae", "scheduler")
    missing = [part for part in needed if part not in given and not (folder / part).is_dir()]
    if not missing:
        return
    folders = " and no ".join(f"{part}/" for part in missing)
    flags = [_FLAGS[part] for part in missing if part in _FLAGS]
    instead = ""
    if flags:
        ours, theirs = (" and ".join(f"--{flag}{end}" for flag in flags) for end in ("", "-path"))
        instead = f"; give {ours} ({theirs} of SGLang's commands)"
    raise CheckpointError(f"checkpoint folder {folder} has no {folders}{instead}")


def _tokenizer(source: CheckpointSource, text_encoder: Path, layout: Path | None) -> Path | None:
    if source.tokenizer:
        return Path(os.path.expanduser(source.tokenizer))
    if layout is not None and not source.text_encoder and (layout / "tokenizer").is_dir():
        return layout / "tokenizer"
    if beside := tokenizer_beside(text_encoder):
        return beside
    if layout is not None and (layout / "tokenizer").is_dir():
        return layout / "tokenizer"
    check_packaged(text_encoder)
    return None
