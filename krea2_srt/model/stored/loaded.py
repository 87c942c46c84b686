"""What became of a file's tensors, in one line."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from krea2_srt.model.stored.formats import FP8, PLAIN
from krea2_srt.model.stored.tensor import StoredTensor

_TAKEN = "taken as they are"
_QUANTISED = {torch.float8_e4m3fn: "fp8", torch.int8: "int8"}


class LoadedWeights:
    """Counts tensors by how they are stored and what they became."""

    def __init__(self) -> None:
        self._plain: Counter[str] = Counter()
        self._quantised: Counter[tuple[str, str]] = Counter()
        self._from_plain: Counter[tuple[str, str]] = Counter()
        self._fitting: dict[tuple[str, str], str] = {}

    def taken(self, source: StoredTensor) -> None:
        """Its 8 bits are the model's."""
        self._quantised[source.kind, _TAKEN] += 1

    def cast(self, source: StoredTensor, dtype: torch.dtype) -> None:
        """It was read, and became numbers of this dtype."""
        if source.kind in PLAIN:
            kind = source.kind.lower()
            if dtype in _QUANTISED:
                self._from_plain[kind, f"quantised to {_QUANTISED[dtype]}"] += 1
            else:
                self._plain[kind] += 1
            return
        if dtype in _QUANTISED:
            became = f"dequantised and quantised to {_QUANTISED[dtype]}"
        else:
            became = f"dequantised to {str(dtype).removeprefix('torch.')}"
            if source.eight_bit is not None:
                self._fitting[source.kind, became] = _QUANTISED[source.eight_bit.dtype]
        self._quantised[source.kind, became] += 1

    def line(self, where: Path, notes: Iterable[str] = (), advise: bool = False) -> str | None:
        """All of it for the log; None where all tensors are stored as plain numbers.

        Args:
            where: the file or folder.
            notes: what else to say.
            advise: whether ``--quantization`` was not asked for, and could be.
        """
        if not self._quantised:
            return None
        counts = sorted(self._quantised.items(), key=lambda one: (one[0][1] != _TAKEN, -one[1]))
        parts = []
        for (kind, how), n in [*counts, *self._from_plain.most_common()]:
            parts.append(f"{n} {_noun(kind, n)} {kind}, {how}")
            if advise and (name := self._fitting.get((kind, how))) is not None:
                parts[-1] += f" (--quantization {name} would take those of the blocks as they are)"
        parts += [f"{n} tensors {kind}" for kind, n in self._plain.most_common()]
        return f"krea2-srt: {where}: {'; '.join([*parts, *notes])}"


def _noun(kind: str, count: int) -> str:
    if kind in FP8:  # vectors too
        return "tensor" if count == 1 else "tensors"
    return "matrix" if count == 1 else "matrices"
