"""The checkpoint that SGLang's options name: a folder, a repo or a single file, and parts that are
elsewhere. Without SGLang at import.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from krea2_srt.environment import read_environment
from krea2_srt.errors import CheckpointError, ConfigError
from krea2_srt.model.json_files import read_json
from krea2_srt.model.parts import CheckpointSource
from krea2_srt.model.releases import CLASS_NAME
from krea2_srt.model.stored.files import open_files
from krea2_srt.sglang.served import is_krea2


def source_of(model_path: str, server_args: Any) -> CheckpointSource:
    """What ``--model-path``, ``--text-encoder-path`` and the like, and the environment name.

    Raises:
        ConfigError: two options name one part, or a setting is wrong.
    """
    return CheckpointSource(
        model_path,
        read_environment().runner.recipe,
        **_given_parts(server_args),
        flags="--{}-path",
    )


def _given_parts(server_args: Any) -> dict[str, str]:
    """Each part that an option names. SGLang has taken files out of ``component_paths``."""
    sources = [server_args.component_paths, server_args.component_weights_paths]
    if server_args.transformer_weights_path:
        sources.append({"transformer": server_args.transformer_weights_path})
    given: dict[str, str] = {}
    for part, path in (item for source in sources for item in source.items() if item[1]):
        if part in given:
            flag = f"--{part.replace('_', '-')}-weights-path"
            raise ConfigError(f"{flag}: has no effect beside {given[part]}, which is {part} too")
        given[part] = path
    return given


def refuse_single_files(model_path: str, server_args: Any, options: Sequence[str]) -> None:
    """Refuse what SGLang's own Krea 2 would be started with in vain.

    Args:
        options: that only it honours.

    Raises:
        ConfigError: the model or a part is a single file, which it cannot read.
    """
    paths = {"--model-path": model_path}
    paths |= {
        f"--{part.replace('_', '-')}-path": path for part, path in _given_parts(server_args).items()
    }
    for flag, path in paths.items():
        if os.path.isfile(os.path.expanduser(path)):
            raise ConfigError(
                f"{flag}: SGLang's own Krea 2, which {', '.join(options)} would need, "
                f"cannot read the single file {path}"
            )


def is_krea2_on_disk(path: str) -> bool:
    """Whether a path of this disk is Krea 2's: a folder by its class name, a file by the names of
    its tensors.
    """
    place = Path(path)
    if place.is_dir():
        return _class_name(place / "model_index.json") == CLASS_NAME
    if not place.is_file():
        return False
    try:
        with open_files([place]) as stored:
            return any("txtfusion." in name or "text_fusion." in name for name in stored.tensors)
    except CheckpointError:
        return is_krea2(place.name)


def _class_name(index: Path) -> Any:
    try:
        return read_json(index).get("_class_name")
    except CheckpointError:
        return None
