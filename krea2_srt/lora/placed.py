"""An adapter in the form in which it is multiplied, on the host or on the model's device."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from krea2_srt.errors import AdapterError
from krea2_srt.kernels.quantize import rotate
from krea2_srt.lora.adapter import Adapter, Factor
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.layers import Linear


@dataclass(frozen=True, eq=False)
class PlacedAdapter:
    """An adapter beside the weights of one model.

    Attributes:
        name: see `Adapter`.
        digest: see `Adapter`; what is remembered of a prompt or a schedule is known by it.
        factors: of each matrix that it changes, in the model's compute dtype; all on one device but
            those that stay on the host.
        downs: [ranks of all, in] of each: those that the factors' are parts of, to be multiplied
            with in one go.
        ups: [ranks of all, rows of the matrix] of each, with zeros where a factor changes nothing:
            one product in place of one for each, which a CPU is twice as fast at. None on a GPU,
            where they would take twice the memory.
        touches_text: whether it changes what becomes of a prompt.
        touches_time: whether it changes what becomes of a schedule.
        stayed: matrices whose factors have stayed in pinned host memory, and come to the device
            when they are multiplied with.
        home: the one on the host whose memory these are in; None where nothing has stayed.
    """

    name: str
    digest: str
    factors: Mapping[nn.Module, tuple[Factor, ...]]
    downs: Mapping[nn.Module, Tensor]
    ups: Mapping[nn.Module, Tensor]
    touches_text: bool
    touches_time: bool
    stayed: frozenset[nn.Module] = frozenset()
    home: "PlacedAdapter | None" = None

    @classmethod
    def on_host(cls, dit: Krea2DiT, adapter: Adapter) -> "PlacedAdapter":
        """Make an adapter ready for a model, in memory that its device copies from.

        Any thread may do so: it reads no weights.

        Raises:
            AdapterError: it is another model's.
        """
        linears = {name: m for name, m in dit.named_modules() if isinstance(m, Linear)}
        factors: dict[nn.Module, tuple[Factor, ...]] = {}
        downs: dict[nn.Module, Tensor] = {}
        ups: dict[nn.Module, Tensor] = {}
        # Where the model runs: not all of its matrices need be there all the time.
        device = dit.img_in.weight.device
        for name, found in adapter.matrices.items():
            linear = linears.get(name)
            if linear is None or not all(_fits(factor, linear) for factor in found):
                raise AdapterError(f"adapter {adapter.name}: its {name} is not this model's")
            downs[linear] = _ready(_down(found, linear), linear, device)
            if device.type == "cpu":
                ups[linear] = _ready(_up(found, linear), linear, device)
                own = _parts_of(ups[linear], found)
            else:
                own = [_ready(factor.up, linear, device) for factor in found]
            factors[linear] = _parts(downs[linear], zip(own, found, strict=True))
        text = set(dit.text_fusion.modules())
        time = {dit.time_linear_1, dit.time_linear_2, dit.time_mod_proj}
        touched = factors.keys()
        return cls(
            adapter.name,
            adapter.digest,
            factors,
            downs,
            ups,
            bool(touched & text),
            bool(touched & time),
        )

    def to(self, device: torch.device, stay: Collection[nn.Module] = ()) -> "PlacedAdapter":
        """A copy on a device, under way on its current stream; of the CPU's, a view.

        Args:
            device: where to.
            stay: matrices whose factors stay where they are.
        """
        if device.type == "cpu":
            return replace(self)

        kept = self.factors.keys() & set(stay)
        downs, moved = dict(self.downs), dict(self.factors)
        for linear, some in self.factors.items():
            if linear not in kept:
                down = downs[linear] = self.downs[linear].to(device, non_blocking=True)
                ups = (factor.up.to(device, non_blocking=True) for factor in some)
                moved[linear] = _parts(down, zip(ups, some, strict=True))
        home = self if kept else None
        return replace(self, factors=moved, downs=downs, stayed=frozenset(kept), home=home)

    @cached_property
    def nbytes(self) -> int:
        """Bytes that it takes where it is."""
        return self.nbytes_without(self.stayed)

    def nbytes_without(self, left: Collection[nn.Module]) -> int:
        """Bytes that the factors of all matrices but some take."""
        found = 0
        for linear, some in self.factors.items():
            if linear in left:
                continue
            if self.ups:
                found += self.downs[linear].nbytes + self.ups[linear].nbytes
            else:
                found += sum(factor.nbytes for factor in some)
        return found


def _fits(factor: Factor, linear: Linear) -> bool:
    rows, width = linear.weight.shape
    return factor.down.shape[1] == width and factor.stop <= rows


def _down(factors: Sequence[Factor], linear: Linear) -> Tensor:
    """Those of all factors, one below another."""
    down = torch.cat([factor.down for factor in factors])
    if linear.format is not None and linear.format.rotation:
        # Its tokens come rotated: a rotation of both factors of a product leaves that as it was.
        return rotate(down, linear.format.rotation)
    return down


def _up(factors: Sequence[Factor], linear: Linear) -> Tensor:
    """Those of all factors, each in its own rows and columns."""
    ranks = sum(factor.rank for factor in factors)
    found = torch.zeros(ranks, len(linear.weight))
    for part, factor in zip(_parts_of(found, factors), factors, strict=True):
        part.copy_(factor.up)
    return found


def _parts_of(up: Tensor, factors: Iterable[Factor]) -> list[Tensor]:
    """The factors' own in `_up`."""
    found, start = [], 0
    for factor in factors:
        found.append(up[start : start + factor.rank, factor.start : factor.stop].t())
        start += factor.rank
    return found


def _ready(tensor: Tensor, linear: Linear, device: torch.device) -> Tensor:
    """A copy in the compute dtype, pinned where there is a device to copy it to."""
    pinned = device.type == "cuda"
    return torch.empty(tensor.shape, dtype=linear.dtype, pin_memory=pinned).copy_(tensor)


def _parts(down: Tensor, factors: Iterable[tuple[Tensor, Factor]]) -> tuple[Factor, ...]:
    """Factors with other tensors: their parts of a common one, and their own."""
    found, start = [], 0
    for up, factor in factors:
        found.append(Factor(down[start : start + factor.rank], up, factor.start))
        start += factor.rank
    return tuple(found)


@dataclass(frozen=True)
class AdapterSet:
    """The adapters of one image, each with its scale; equal where they do the same.

    Attributes:
        uses: those whose scale is not 0.
    """

    uses: tuple[tuple[PlacedAdapter, float], ...] = ()

    @classmethod
    def of(cls, *uses: tuple[PlacedAdapter, float]) -> "AdapterSet":
        """Adapters with any scales; at 0 one is left away, and the model is the base model to the
        bit.
        """
        kept = [(adapter, scale) for adapter, scale in uses if scale]
        # In one order, or rounding would depend on who was named first.
        return cls(tuple(sorted(kept, key=lambda use: (use[0].digest, use[1]))))

    def __bool__(self) -> bool:
        return bool(self.uses)

    @cached_property
    def text_key(self) -> tuple[tuple[str, float], ...]:
        """What a prompt's context depends on: equal sets have equal ones, as do those that leave
        the prompt alone.
        """
        return tuple((a.digest, scale) for a, scale in self.uses if a.touches_text)

    @cached_property
    def time_key(self) -> tuple[tuple[str, float], ...]:
        """What a schedule's modulation depends on."""
        return tuple((a.digest, scale) for a, scale in self.uses if a.touches_time)


NO_ADAPTERS = AdapterSet()
