"""What a file has for one matrix, as it is stored."""

import math
from typing import Any

import torch
from torch import Tensor

from krea2_srt.errors import AdapterError
from krea2_srt.lora.keys import shown
from krea2_srt.model.matrices import Matrix

_FACTOR_DTYPES = ("BF16", "F16", "F32", "F64")
_ALPHA_DTYPES = (*_FACTOR_DTYPES, "I64", "I32", "I16", "I8", "U8")

Shape = tuple[int, ...]


class StoredModule:
    """The tensors of one matrix, by role (see `krea2_srt.lora.keys.split_key`).

    Args:
        tensors: the open file.
        matrix: which one of the model.
        name: the trainer's.
    """

    def __init__(self, tensors: Any, matrix: Matrix, name: str) -> None:
        self._tensors = tensors
        self._keys: dict[str, str] = {}
        self.matrix = matrix
        self.name = name
        self.shapes: dict[str, Shape] = {}

    def add(self, role: str, key: str) -> None:
        """Take a tensor in, by its header.

        Raises:
            AdapterError: there is another one of this role, or it is not stored as numbers.
        """
        if role in self._keys:
            raise AdapterError(f"{self.key(role)} and {shown(key)} are of the same matrix")
        stored = self._tensors.get_slice(key)
        dtype, known = stored.get_dtype(), _ALPHA_DTYPES if role == "alpha" else _FACTOR_DTYPES
        if dtype not in known:
            raise AdapterError(f"{shown(key)} is {dtype}, expected one of {', '.join(known)}")
        self._keys[role] = key
        shape = tuple(stored.get_shape())
        # Some tools store a matrix as a convolution of 1 x 1.
        self.shapes[role] = shape[:2] if shape[2:] == (1, 1) else shape

    @property
    def roles(self) -> set[str]:
        """What is there, but for alpha."""
        return self._keys.keys() - {"alpha"}

    def key(self, role: str = "") -> str:
        """The file's key of a role, or any one of this matrix, for messages."""
        return shown(self._keys[role] if role else min(self._keys.values()))

    def tensor(self, role: str) -> Tensor:
        """One of the tensors, float32.

        Raises:
            AdapterError: it is not finite.
        """
        stored: Tensor = self._tensors.get_tensor(self._keys[role])
        # A copy: what safetensors gives changes with the file, for as long as it lives.
        tensor = stored.to(torch.float32, copy=True).reshape(self.shapes[role])
        if not tensor.isfinite().all():
            raise AdapterError(f"{self.key(role)} has NaNs or infinities in it")
        return tensor

    def alpha(self) -> float | None:
        """The module's own alpha, if it has one.

        Raises:
            AdapterError: it is no number, or 0.
        """
        if "alpha" not in self.shapes:
            return None
        if math.prod(self.shapes["alpha"]) != 1:
            shape = list(self.shapes["alpha"])
            raise AdapterError(f"{self.key('alpha')} has shape {shape}, expected one number")
        alpha = self.tensor("alpha").item()
        if alpha == 0:
            raise AdapterError(f"{self.key('alpha')} is 0, by which the LoRA would change nothing")
        return alpha
