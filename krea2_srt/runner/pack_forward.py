"""One step of a pack, run in slices of transformer blocks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from krea2_srt.model.attention import VarlenAttention
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.modulation import Modulation
from krea2_srt.runner.lanes import Lanes
from krea2_srt.runner.packing import PackCache

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
        self._dit = dit
        self._attention = attention
        self._lanes = Lanes.of(sequences)
        self._pack = packs.get(self._lanes.shapes)
        self._modulation = Modulation.stack(self._lanes.modulations)
        self._tokens = self._pack.place(self._pack.image_spans, self._lanes.tokens)
        context = self._pack.place(self._pack.text_spans, self._lanes.contexts)
        self._x = dit.embed(self._tokens, context, self._pack)

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
        pack, lanes, tokens = self._pack, self._lanes, self._tokens
        scalars = torch.tensor([lanes.dt, lanes.guidance]).to(tokens.device)
        velocity = torch.empty_like(tokens)
        broken = torch.empty(len(lanes.shapes), dtype=torch.int32, device=tokens.device)
        self._dit.operations.euler_step(
            tokens,
            self._dit.finish(self._x, pack, self._modulation),
            pack.rows.index,
            pack.partner,
            scalars[0],
            scalars[1],
            velocity,
            broken,
        )
        flags = broken.tolist()
        lanes.advance(pack, tokens, velocity)
        return lanes.broken(flags)
