"""Names that tools put before those of a model's tensors."""

from collections.abc import Mapping

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


def _all_begin_with(prefix: str, tensors: Mapping[str, StoredTensor]) -> bool:
    return bool(tensors) and all(name.startswith(prefix) for name in tensors)
