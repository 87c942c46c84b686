"""Adapters at addresses that stay, so that a CUDA graph serves others than it was captured with.

A slot has room for one adapter: zeros where it has no factors. The kernels that read slots are in
`krea2_srt.kernels.lora`, which says how they lie in memory.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from krea2_srt.lora.adapter import Factor
from krea2_srt.lora.placed import PlacedAdapter
from krea2_srt.model.dit import DiTBlock, Krea2DiT
from krea2_srt.model.layers import Linear

RANKS = (16, 32, 64, 128)
"""What a slot's rank may be; an adapter of a lower one is padded with zeros."""

NUM_SLOTS = 8
"""Different adapters of one pack. Two images of four each have as many."""


@dataclass(frozen=True)
class MatrixSlots:
    """The slots of one fused matrix, of a number of parts.

    Attributes:
        down: [num_slots, parts * R, width], all parts one below the other.
        up: [num_slots, columns, R].
        part_starts: the first column of each part.
    """

    down: Tensor
    up: Tensor
    part_starts: tuple[int, ...]

    @property
    def parts(self) -> int:
        return len(self.part_starts)


def slotted_matrices(dit: Krea2DiT) -> list[Linear]:
    """The matrices that every step multiplies with. Those of a prompt and of a schedule are not
    among them: what they give is remembered.
    """
    found = [dit.img_in]
    for block in dit.blocks:
        assert isinstance(block, DiTBlock)
        found += [block.attn.qkvg, block.attn.out, block.ff.gate_up, block.ff.down]
    return [*found, dit.final_linear]


def slot_bytes(dit: Krea2DiT, rank: int) -> int:
    """Bytes of one slot."""
    return sum(
        rank
        * (len(linear.parts) * linear.weight.shape[1] + len(linear.weight))
        * linear.dtype.itemsize
        for linear in slotted_matrices(dit)
    )


def largest_rank(dit: Krea2DiT, num_slots: int, max_bytes: int) -> int | None:
    """The largest of `RANKS` with which slots fit into so many bytes; None if none does."""
    fitting = (rank for rank in RANKS if num_slots * slot_bytes(dit, rank) <= max_bytes)
    return max(fitting, default=None)


class AdapterSlots:
    """A model's slots.

    What is in them is a copy of what `PlacedAdapter` has on the device, which stays there: prompts,
    schedules and packs without a graph are generated with that. An adapter that is in a slot is on
    the device twice.

    All calls belong on the stream of the steps. There a slot can be overwritten at any time: a step
    that was launched has read it by then. One that is launched later and needs what was there has
    it copied again.

    Args:
        dit: the model, on its device.
        rank: R, one of `RANKS`.
        num_slots: at least 1.

    Attributes:
        loads: how often an adapter was copied into a slot.
        reloads: those of an adapter that had been in one before.
    """

    def __init__(self, dit: Krea2DiT, rank: int, num_slots: int = NUM_SLOTS) -> None:
        assert rank in RANKS
        assert num_slots > 0
        self.rank = rank
        self.num_slots = num_slots
        self.loads = self.reloads = 0
        self._linears = slotted_matrices(dit)
        # By digest, the least recently used first.
        self._taken: OrderedDict[str, int] = OrderedDict()
        self._free = list(range(num_slots))
        self._seen: set[str] = set()
        self._ranks: WeakKeyDictionary[PlacedAdapter, int] = WeakKeyDictionary()
        self._made: dict[nn.Module, MatrixSlots] | None = self._new_matrices()

    @property
    def matrices(self) -> Mapping[nn.Module, MatrixSlots]:
        """The slots of each matrix, at addresses that stay until `release`.

        Raises:
            torch.OutOfMemoryError: they were released, and find no memory.
        """
        if self._made is None:
            self._made = self._new_matrices()
        return self._made

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        made = (self._made or {}).values()
        return sum(slots.down.nbytes + slots.up.nbytes for slots in made)

    def fits(self, adapter: PlacedAdapter) -> bool:
        """Whether a slot has room for an adapter: for the ranks, added up, of the factors of each
        part.
        """
        needed = self._ranks.get(adapter)
        if needed is None:
            found = (_rank(linear, adapter.factors.get(linear, ())) for linear in self._linears)
            needed = self._ranks[adapter] = max(found)
        return needed <= self.rank

    def fit(self, adapters: Mapping[str, PlacedAdapter]) -> bool:
        """Whether there is room for all of these at a time.

        Args:
            adapters: by digest.
        """
        return len(adapters) <= self.num_slots and all(map(self.fits, adapters.values()))

    def place(self, adapters: Mapping[str, PlacedAdapter]) -> dict[str, int]:
        """Have adapters in slots, where the least recently used ones make room.

        Args:
            adapters: by digest; `fit` says that they do.

        Returns:
            The slot of each.

        Raises:
            torch.OutOfMemoryError: see `matrices`.
        """
        assert self.fit(adapters)
        # First, so that none of them makes room for another.
        for digest in adapters:
            if digest in self._taken:
                self._taken.move_to_end(digest)
        for digest, adapter in adapters.items():
            if digest not in self._taken:
                if not self._free:
                    self._free.append(self._taken.popitem(last=False)[1])
                # One that fails half-way leaves its slot free.
                self.load(self._free[-1], adapter)
                self._taken[digest] = self._free.pop()
        return {digest: self._taken[digest] for digest in adapters}

    def load(self, slot: int, adapter: PlacedAdapter) -> None:
        """Copy an adapter into a slot, and nothing else: all that was there is overwritten.

        Args:
            slot: below ``num_slots``.
            adapter: that `fits`, on the host or the device.

        Raises:
            torch.OutOfMemoryError: see `matrices`.
        """
        assert self.fits(adapter)
        places: list[Tensor] = []
        sources: list[Tensor] = []
        matrices = self.matrices
        for linear in self._linears:
            down, up = matrices[linear].down[slot], matrices[linear].up[slot]
            torch._foreach_zero_([down, up])
            for piece in _pieces(linear, adapter.factors.get(linear, ())):
                factor, first = piece.factor, piece.part * self.rank + piece.at
                places.append(down[first : first + factor.rank])
                sources.append(factor.down)
                places.append(up[piece.start : piece.stop, piece.at : piece.at + factor.rank])
                sources.append(factor.up[piece.start - factor.start : piece.stop - factor.start])
        if places:
            torch._foreach_copy_(places, sources, non_blocking=True)
        self.loads += 1
        self.reloads += adapter.digest in self._seen
        self._seen.add(adapter.digest)

    def statistics(self) -> dict[str, int]:
        """Counters of copies, and bytes."""
        return {
            "adapter_slot_bytes": self.nbytes,
            "adapter_slot_loads": self.loads,
            "adapter_slot_reloads": self.reloads,
        }

    def release(self) -> None:
        """Give the memory back, and forget what was in it; nobody may read the slots any more. New
        ones are made when they are needed.
        """
        self._made = None
        self._taken.clear()
        self._free = list(range(self.num_slots))

    def _new_matrices(self) -> dict[nn.Module, MatrixSlots]:
        def zeros(linear: Linear, *shape: int) -> Tensor:
            device = linear.weight.device
            return torch.zeros(self.num_slots, *shape, dtype=linear.dtype, device=device)

        found: dict[nn.Module, MatrixSlots] = {}
        for linear in self._linears:
            rows, width = linear.weight.shape
            down = zeros(linear, len(linear.parts) * self.rank, width)
            up = zeros(linear, rows, self.rank)
            found[linear] = MatrixSlots(down, up, _bounds(linear)[:-1])
        return found


@dataclass(frozen=True)
class _Piece:
    """What of a factor lies in one part of a fused matrix. A factor that spans several has one in
    each, with the same down.

    Attributes:
        factor: the factor.
        part: which part.
        at: its first place among the part's R.
        start, stop: rows of the fused matrix.
    """

    factor: Factor
    part: int
    at: int
    start: int
    stop: int


def _pieces(linear: Linear, factors: Sequence[Factor]) -> Iterator[_Piece]:
    for part, (first, last) in enumerate(pairwise(_bounds(linear))):
        at = 0
        for factor in factors:
            start, stop = max(first, factor.start), min(last, factor.stop)
            if start < stop:
                yield _Piece(factor, part, at, start, stop)
                at += factor.rank


def _rank(linear: Linear, factors: Sequence[Factor]) -> int:
    """The least R that holds these factors."""
    return max((piece.at + piece.factor.rank for piece in _pieces(linear, factors)), default=0)


def _bounds(linear: Linear) -> tuple[int, ...]:
    """Rows where the parts begin, and where the last one ends."""
    return tuple(accumulate(linear.parts.values(), initial=0))
