"""One step of a pack, run in slices of transformer blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from krea2_srt.model.attention import VarlenAttention
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.host_copies import to_device
from krea2_srt.model.modulation import Modulation
from krea2_srt.runner.forward_batch import ForwardBatch
from krea2_srt.runner.packing import PackCache
from krea2_srt.runner.sequence import DenoisingSequence


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
        sequences: Sequence[DenoisingSequence],
    ) -> None:
        self._dit = dit
        self._attention = attention
        self._batch = ForwardBatch.of(sequences)
        self._pack = packs.get(self._batch.shapes)
        self._modulation = Modulation.stack(self._batch.modulations)
        self._tokens = self._pack.place(self._pack.image_spans, self._batch.tokens)
        context = self._pack.place(self._pack.text_spans, self._batch.contexts)
        self._x = dit.embed(self._tokens, context, self._pack)
        # Here, and not between the blocks and the last layer, where the device would wait.
        self._scalars = to_device(
            torch.tensor([self._batch.dt, self._batch.guidance]), self._tokens.device
        )

    def run(self, blocks: range) -> None:
        """Run some blocks; those before them have run."""
        self._x = self._dit.run_blocks(
            self._x, self._pack, self._modulation, blocks, self._attention
        )

    def finish(self) -> Tensor:
        """Apply an Euler step to every sequence; all blocks have run. Waits for nothing.

        Returns:
            int32 [branches], not 0 where latents are no longer finite.
        """
        pack, batch, tokens = self._pack, self._batch, self._tokens
        velocity = torch.empty_like(tokens)
        non_finite = torch.empty(len(batch.shapes), dtype=torch.int32, device=tokens.device)
        self._dit.operations.euler_step(
            tokens,
            self._dit.finish(self._x, pack, self._modulation),
            pack.rows.index,
            pack.uncond_index,
            self._scalars[0],
            self._scalars[1],
            velocity,
            non_finite,
        )
        batch.advance(pack, tokens, velocity)
        return non_finite
