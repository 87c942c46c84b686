"""The config of a text encoder or a VAE that is a single file.

A folder has its ``config.json``. A single file may have the same JSON as ``config`` in its
metadata, or lie beside it; else its sizes are read off its tensors.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from krea2_srt.errors import CheckpointError
from krea2_srt.model.json_files import parse_json, read_json

CONFIG = "config"
"""A file's metadata: the name of its config."""

T = TypeVar("T")


def stated_config(
    file: Path,
    metadata: Mapping[str, str],
    fits: Callable[[dict[str, Any]], bool],
    parse: Callable[[dict[str, Any]], T],
) -> T | None:
    """The config that a single file has in its metadata, or beside it; None if it has none.

    Args:
        file: of weights.
        metadata: what it says of itself.
        fits: whether a ``config.json`` that lies beside the file is one of this kind of model, and
            not of something else in the same folder.
        parse: what makes a config of it.

    Raises:
        CheckpointError: it is not JSON, or raised by ``parse``; names where it is.
    """
    if CONFIG in metadata:
        where = f"{file}: {CONFIG} in its metadata"
        try:
            values = json.loads(metadata[CONFIG])
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{where} cannot be read: {error}") from None
        if not isinstance(values, dict):
            raise CheckpointError(f"{where} is not a JSON object")
        try:
            return parse(values)
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error}") from None
    beside = file.with_name("config.json")
    if beside.is_file() and fits(read_json(beside)):
        return parse_json(beside, parse)
    return None
