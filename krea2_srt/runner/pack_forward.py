"""One step of a pack, run in slices of transformer blocks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from krea2_srt.model.attention import VarlenAttention
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.modulation import Modulation
from krea2_srt.runner.packing import PackCache, SequenceShape

if TYPE_CHECKING:
    from krea2_srt.runner.model_runner import DenoisingSequence


class PackForward:
    """A packed forward that can pause between blocks, holding its hidden states.

    The sequences change only in `finish`: a forward that fails or is dropped before leaves them
    as they were.

    Args:
        dit: the model.
        attention: how the pack attends.
        packs: where layouts are remembered.
        sequences: the pack, each at its own step.
    """

    def __init__(
        self,
        dit: Krea2DiT,
        attention: VarlenAttention,
        packs: PackCache,
        sequences: "Sequence[DenoisingSequence]",
    ) -> None:
        self.sequences = sequences
        self._dit = dit
        self._attention = attention
        lanes = [(s, context) for s in sequences for context in s.lanes]
        self._pack = packs.get(
            tuple(SequenceShape(len(context), s.rows, s.columns) for s, context in lanes)
        )
        self._modulation = Modulation.stack([s.modulation.row(s.step) for s, _ in lanes])
        self._x = dit.embed(
            torch.cat([s.tokens for s, _ in lanes]),
            torch.cat([context for _, context in lanes]),
            self._pack,
        )

    def run(self, blocks: range) -> None:
        """Run some blocks; those before them have run."""
        self._x = self._dit.run_blocks(
            self._x, self._pack, self._modulation, blocks, self._attention
        )

    def finish(self) -> "list[DenoisingSequence]":
        """Apply an Euler step to every sequence; all blocks have run.

        Returns:
            The sequences whose latents are no longer finite.
        """
        velocity = self._dit.finish(self._x, self._pack, self._modulation).float()
        stepped: list[tuple[Tensor, Tensor | None]] = []
        start = 0
        for s in self.sequences:
            size = s.rows * s.columns
            v = velocity[start : start + size]
            start += size
            if s.negative_context is not None:
                v = v + s.guidance * (v - velocity[start : start + size])
                start += size
            tokens = s.tokens + (s.schedule.sigmas[s.step + 1] - s.schedule.sigmas[s.step]) * v
            stepped.append((tokens, v.clone() if s.keep_velocity else None))
        # One look for all: on a GPU each would wait for the device.
        finite = torch.stack([torch.isfinite(tokens).all() for tokens, _ in stepped]).tolist()
        # From here on nothing can fail: all sequences step, or none.
        for s, (tokens, v_kept) in zip(self.sequences, stepped, strict=True):
            s.tokens, s.velocity = tokens, v_kept
            s.step += 1
        return [s for s, good in zip(self.sequences, finite, strict=True) if not good]
