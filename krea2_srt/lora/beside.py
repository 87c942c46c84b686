"""Adapters beside the model's matrices, in torch's operations: `krea2_srt.model.deltas.Deltas`.

    out[rows of an image] += scale * (x[rows] @ down.T) @ up.T

for each adapter of each image of a pack. The weights stay as they are, in 8 bits too, so that
images with other adapters, or with none, can be in the same pack.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from krea2_srt.kernels.quantize import QuantizedTokens, Tokens
from krea2_srt.lora.placed import AdapterSet


@dataclass(frozen=True)
class Run:
    """Consecutive rows with the same adapters.

    Attributes:
        start, end: the rows.
        adapters: theirs; not empty.
    """

    start: int
    end: int
    adapters: AdapterSet


class PackDeltas:
    """What the adapters of a pack's sequences add.

    Args:
        runs: the tokens that have any, in order.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = tuple(runs)
        self._touched = {
            m for run in runs for adapter, _ in run.adapters.uses for m in adapter.factors
        }

    @classmethod
    def of(
        cls, spans: Iterable[tuple[int, int]], sets: Iterable[AdapterSet]
    ) -> "PackDeltas | None":
        """Those of some sequences; None if none has an adapter.

        Args:
            spans: (start, end) of each one's tokens, one after another.
            sets: each one's adapters.
        """
        runs: list[Run] = []
        for (start, end), adapters in zip(spans, sets, strict=True):
            if not adapters:
                continue
            if runs and (runs[-1].end, runs[-1].adapters) == (start, adapters):
                start = runs.pop().start
            runs.append(Run(start, end, adapters))
        return cls(runs) if runs else None

    def touch(self, linear: nn.Module) -> bool:
        return linear in self._touched

    def add(self, linear: nn.Module, x: Tokens, out: Tensor) -> None:
        if linear in self._touched:
            for run in self.runs:
                _add(run.adapters, linear, _rows(x, run.start, run.end), out[run.start : run.end])


class UniformDeltas:
    """What the same adapters add to all rows.

    Args:
        adapters: not empty.
    """

    def __init__(self, adapters: AdapterSet) -> None:
        self._adapters = adapters

    @classmethod
    def of(cls, adapters: AdapterSet) -> "UniformDeltas | None":
        """None if there are none."""
        return cls(adapters) if adapters else None

    def touch(self, linear: nn.Module) -> bool:
        return any(linear in adapter.factors for adapter, _ in self._adapters.uses)

    def add(self, linear: nn.Module, x: Tokens, out: Tensor) -> None:
        if self.touch(linear):
            if isinstance(x, Tensor):
                x = x.flatten(0, -2)
            _add(self._adapters, linear, x, out.view(-1, out.shape[-1]))


def _rows(x: Tokens, start: int, end: int) -> Tokens:
    if isinstance(x, QuantizedTokens):
        return QuantizedTokens(x.values[start:end], x.scale[start:end])
    return x[start:end]


def _add(adapters: AdapterSet, linear: nn.Module, x: Tokens, out: Tensor) -> None:
    """Add to a matrix's product [rows, width], in place."""
    plain: Tensor | None = None
    for adapter, scale in adapters.uses:
        if linear not in adapter.factors:
            continue
        down, start = adapter.downs[linear], 0
        if plain is None:
            dequantized = x.dequantized() if isinstance(x, QuantizedTokens) else x
            plain = dequantized.to(down.dtype)
        narrow = plain @ down.t()
        for factor in adapter.factors[linear]:
            own = narrow[:, start : start + factor.rank]
            out[:, factor.start : factor.stop].addmm_(own, factor.up.t(), alpha=scale)
            start += factor.rank
