"""Names that tools put before those of a model's tensors."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from krea2_srt.errors import CheckpointError
from krea2_srt.model.stored.tensor import StoredTensor

PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "module.",
    "model.",
)
"""Longest first where one begins with another."""


def without_prefix(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The same without the prefix that all names have, if they have one; prefixes may be nested."""
    found = dict(tensors)
    while prefix := next((p for p in PREFIXES if _all_begin_with(p, found)), None):
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found


def check_no_prefix(tensors: Mapping[str, StoredTensor], where: Path) -> None:
    """Check what `without_prefix` has left, of a model none of whose names begins like a prefix.

    Raises:
        CheckpointError: a prefix is left, as only some names had it.
    """
    for name, tensor in tensors.items():
        if prefix := next((p for p in PREFIXES if name.startswith(p)), None):
            other = next(t.key for n, t in tensors.items() if not n.startswith(prefix))
            raise CheckpointError(f"{where}: {tensor.key} begins with {prefix}, {other} does not")


def unprefixed(name: str, prefixes: Sequence[str] = PREFIXES) -> str:
    """A name without any prefix that tools put before it, however nested."""
    while prefix := next((p for p in prefixes if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name


def _all_begin_with(prefix: str, tensors: Mapping[str, StoredTensor]) -> bool:
    return bool(tensors) and all(name.startswith(prefix) for name in tensors)
