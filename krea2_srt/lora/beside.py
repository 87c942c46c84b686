"""Adapters beside the model's matrices, in torch's operations: `krea2_srt.model.deltas.Deltas`.

    out[rows of an image] += scale * (x[rows] @ down.T) @ up.T

for each adapter of each image of a pack. The weights stay as they are, in 8 bits too, so that
images with other adapters, or with none, can be in the same pack.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
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
        # One after another and equally long, as images of one size are: one product for all.
        length = runs[0].end - runs[0].start
        self._is_even = all(
            run.start == runs[0].start + number * length and run.end == run.start + length
            for number, run in enumerate(runs)
        )
        self._at_once: dict[nn.Module, tuple[Tensor, Tensor, Tensor] | None] = {}
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
        if linear not in self._touched:
            return
        if linear not in self._at_once:
            self._at_once[linear] = self._stacked(linear)
        if (stacked := self._at_once[linear]) is not None:
            self._add_at_once(*stacked, x, out)
            return
        for run in self.runs:
            _add(run.adapters, linear, _rows(x, run.start, run.end), out[run.start : run.end])

    def _stacked(self, linear: nn.Module) -> tuple[Tensor, Tensor, Tensor] | None:
        """The factors of all runs, so that two products do for all; None where they are of
        different shapes.

        Returns:
            [runs, in, ranks], [runs, ranks, rows of the matrix], and scales [runs, 1, ranks].
        """
        if not self._is_even or len(self.runs) == 1:
            return None
        joined = [j for run in self.runs if (j := _joined(run.adapters, linear)) is not None]
        if len(joined) < len(self.runs) or len({len(j.down) for j in joined}) > 1:
            return None
        downs, ups = torch.stack([j.down for j in joined]), torch.stack([j.up for j in joined])
        scales = torch.stack([j.scales for j in joined])[:, None]
        return downs.transpose(1, 2).contiguous(), ups, scales

    def _add_at_once(
        self, downs: Tensor, ups: Tensor, scales: Tensor, x: Tokens, out: Tensor
    ) -> None:
        start, stop, count = self.runs[0].start, self.runs[-1].end, len(self.runs)
        rows = _plain(_rows(x, start, stop), downs.dtype)
        narrow = torch.bmm(rows.view(count, -1, rows.shape[-1]), downs).mul_(scales)
        out[start:stop].view(count, -1, out.shape[-1]).baddbmm_(narrow, ups)


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


@dataclass(frozen=True)
class _Joined:
    """Several adapters of a matrix as one with the sum of their ranks.

    Attributes:
        down: [ranks, in].
        up: [ranks, rows of the matrix].
        scales: [ranks].
    """

    down: Tensor
    up: Tensor
    scales: Tensor


def _joined(adapters: AdapterSet, linear: nn.Module) -> _Joined | None:
    """None where one does not have its ups in one, or none changes the matrix."""
    own = [(a, scale) for a, scale in adapters.uses if linear in a.factors]
    if not own or not all(linear in adapter.ups for adapter, _ in own):
        return None
    downs, ups = zip(*((a.downs[linear], a.ups[linear]) for a, _ in own), strict=True)
    scales = [scale for (_, scale), down in zip(own, downs, strict=True) for _ in range(len(down))]
    down, up = (some[0] if len(own) == 1 else torch.cat(some) for some in (downs, ups))
    return _Joined(down, up, torch.tensor(scales, dtype=up.dtype))


def _plain(x: Tokens, dtype: torch.dtype) -> Tensor:
    return (x.dequantized() if isinstance(x, QuantizedTokens) else x).to(dtype)


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
        # Pinned where it is on the host, as of a streamed block: a small copy, in the order of the
        # stream.
        down, start = adapter.downs[linear].to(out.device, non_blocking=True), 0
        if plain is None:
            plain = _plain(x, down.dtype)
        narrow = plain @ down.t()
        if (up := adapter.ups.get(linear)) is not None:
            out.addmm_(narrow, up, alpha=scale)
            continue
        for factor in adapter.factors[linear]:
            own = narrow[:, start : start + factor.rank]
            up = factor.up.to(out.device, non_blocking=True)
            out[:, factor.start : factor.stop].addmm_(own, up.t(), alpha=scale)
            start += factor.rank
