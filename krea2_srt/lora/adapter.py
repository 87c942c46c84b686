"""What an adapter is once its file is read: low-rank changes of the model's own matrices."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from krea2_srt.errors import AdapterError


@dataclass(frozen=True, eq=False)
class Factor:
    """A change of some rows of a `Linear`: ``rows[start : start + out] += up @ down``.

    Attributes:
        down: [rank, in], float32 as it is read.
        up: [out, rank], the same, with the file's scale multiplied in.
        start: the first row, where several matrices are fused.
    """

    down: Tensor
    up: Tensor
    start: int = 0

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def stop(self) -> int:
        """The row that follows the last one."""
        return self.start + len(self.up)

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + self.up.nbytes


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA for one model.

    Attributes:
        name: of its file or folder, without the ending.
        digest: SHA-256 of its files, in hexadecimal: what it is, whatever it is called.
        matrices: by the DiT's name of a `Linear`, as in ``blocks.0.attn.qkvg``; the factors of
            one are sorted by rows and do not overlap.
    """

    name: str
    digest: str
    matrices: Mapping[str, tuple[Factor, ...]]

    @property
    def rank(self) -> int:
        """The largest of its factors."""
        return max(factor.rank for factors in self.matrices.values() for factor in factors)

    @property
    def nbytes(self) -> int:
        return sum(factor.nbytes for factors in self.matrices.values() for factor in factors)


def check_different(adapters: Iterable[tuple[Path, Adapter]]) -> None:
    """Check that none is there twice, under whatever names.

    Raises:
        AdapterError: two are the same.
    """
    found: dict[str, Path] = {}
    for path, adapter in adapters:
        first = found.setdefault(adapter.digest, path)
        if first is not path:
            raise AdapterError(f"adapter {path} is the same as {first}; give one, with its scale")
