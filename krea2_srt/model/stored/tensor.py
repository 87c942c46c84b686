"""One tensor of a checkpoint, however it is stored."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from krea2_srt.errors import CheckpointError
from krea2_srt.kernels.quantize import QuantizedTokens, TokenFormat
from krea2_srt.model.stored.extent import Extent


class StoredTensor(Protocol):
    """A tensor that its file's header speaks of; nothing of it is read yet.

    Attributes:
        key: its name in the file, for messages.
        shape: as the model sees it, whatever the file packs.
        kind: how it is stored, for messages, such as ``BF16`` or ``fp8_scaled``.
        eight_bit: what multiplies it as it is stored; None where it is not a matrix in 8 bits.
        extent: how far of its file has to be there before it is read.
    """

    @property
    def key(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def kind(self) -> str: ...

    @property
    def eight_bit(self) -> TokenFormat | None: ...

    @property
    def extent(self) -> Extent: ...

    def read(self) -> Tensor:
        """The tensor on the host, in its own dtype, or float32 where it is stored quantised."""

    def read_eight_bit(self) -> QuantizedTokens:
        """The rows of a matrix as they are stored: values [out, in], scales float32 [out, 1]."""


def renamed(
    stored: Mapping[str, StoredTensor], rename: Callable[[str], str], where: Path
) -> dict[str, StoredTensor]:
    """The same tensors by other names.

    Raises:
        CheckpointError: two have the same name then.
    """
    found: dict[str, StoredTensor] = {}
    for old, tensor in stored.items():
        name = rename(old)
        if name in found:
            raise CheckpointError(
                f"{where}: {found[name].key} and {tensor.key} are names of the same tensor"
            )
        found[name] = tensor
    return found


def shapes_of(stored: Mapping[str, StoredTensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by name."""
    return {name: tensor.shape for name, tensor in stored.items()}
