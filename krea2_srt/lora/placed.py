"""An adapter on the model's device, in the form in which it is multiplied."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

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
        factors: of each matrix that it changes, on the model's device, in its compute dtype.
        touches_text: whether it changes what becomes of a prompt.
        touches_time: whether it changes what becomes of a schedule.
    """

    name: str
    digest: str
    factors: Mapping[nn.Module, tuple[Factor, ...]]
    touches_text: bool
    touches_time: bool

    @classmethod
    def beside(cls, dit: Krea2DiT, adapter: Adapter) -> "PlacedAdapter":
        """Put an adapter on a model's device.

        Raises:
            AdapterError: it is another model's.
        """
        linears = {name: m for name, m in dit.named_modules() if isinstance(m, Linear)}
        factors: dict[nn.Module, tuple[Factor, ...]] = {}
        for name, found in adapter.matrices.items():
            linear = linears.get(name)
            if linear is None or not all(_fits(factor, linear) for factor in found):
                raise AdapterError(f"adapter {adapter.name}: its {name} is not this model's")
            factors[linear] = tuple(_placed(factor, linear) for factor in found)
        text = set(dit.text_fusion.modules())
        time = {dit.time_linear_1, dit.time_linear_2, dit.time_mod_proj}
        touched = factors.keys()
        return cls(
            adapter.name, adapter.digest, factors, bool(touched & text), bool(touched & time)
        )

    @cached_property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(factor.nbytes for some in self.factors.values() for factor in some)


def _fits(factor: Factor, linear: Linear) -> bool:
    rows, width = linear.weight.shape
    return factor.down.shape[1] == width and factor.stop <= rows


def _placed(factor: Factor, linear: Linear) -> Factor:
    down = factor.down
    if linear.format is not None and linear.format.rotation:
        # Its tokens come rotated: a rotation of both factors of a product leaves that as it was.
        down = rotate(down, linear.format.rotation)
    device = linear.weight.device

    def placed(tensor: Tensor) -> Tensor:
        return tensor.to(device, linear.dtype, copy=True)

    return Factor(placed(down), placed(factor.up), factor.start)


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
