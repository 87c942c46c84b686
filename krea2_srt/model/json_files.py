"""JSON files of a checkpoint, read without torch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from krea2_srt.errors import CheckpointError

T = TypeVar("T")


def read_json(file: Path) -> dict[str, object]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, unreadable or not a JSON object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return value


def parse_json(file: Path, parse: Callable[[dict[str, Any]], T]) -> T:
    """Read a JSON object and parse it; what is wrong with it names the file.

    Raises:
        CheckpointError: see `read_json`, or raised by ``parse``.
    """
    values = read_json(file)
    try:
        return parse(values)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
