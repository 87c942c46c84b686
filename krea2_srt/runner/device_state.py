"""What one image has on the device."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from krea2_srt.engine.lifecycle import Sequence
from krea2_srt.lora.beside import PackDeltas
from krea2_srt.lora.placed import NO_ADAPTERS, AdapterSet
from krea2_srt.model.schedule import Schedule
from krea2_srt.runner.schedule_modulation import ScheduleModulation
from krea2_srt.runner.sequence_shape import SequenceShape
from krea2_srt.runner.side_stream import SideJob


@dataclass(eq=False)
class DeviceState:
    """All that one image has on the device, from the context of its prompt to its pixels.

    Attributes:
        sequence: which image, how many steps are done, and whether somebody wants previews.
        contexts: [text tokens, hidden] of each of its branches: the fused prompt, and under
            guidance the negative one.
        shapes: what a pack must know of each of its branches.
        schedule: its sigmas.
        modulation: the DiT's, a row per step of the schedule; it is not held here.
        adapters: which it is generated with.
        deltas: what adapters add to the pack that it leads, while it does.
        tokens: float32 [rows * columns, 64], the noisy patches at the current step; None until the
            first one begins, so that what waits takes no memory.
        velocity: of the last step, like tokens; kept where somebody wants previews.
        decode: what decodes it, while it is at it.
        pixels: uint8 [height, width, 3] on the host, until they are taken.
    """

    sequence: Sequence
    contexts: tuple[Tensor, ...]
    shapes: tuple[SequenceShape, ...]
    schedule: Schedule
    modulation: ScheduleModulation
    adapters: AdapterSet = NO_ADAPTERS
    deltas: PackDeltas | None = None
    tokens: Tensor | None = None
    velocity: Tensor | None = None
    decode: SideJob | None = None
    pixels: np.ndarray | None = None

    @property
    def step(self) -> int:
        """Steps already done."""
        return self.sequence.step

    @property
    def done(self) -> bool:
        return self.step == self.schedule.steps

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        return self.shapes[0].rows, self.shapes[0].columns

    @property
    def num_tokens(self) -> int:
        """Tokens that its next forward takes, both branches under guidance."""
        return sum(self.sequence.tokens)

    @property
    def empty(self) -> bool:
        """Whether nothing of it is left: it is released, and its pixels are taken."""
        return not self.contexts and self.pixels is None

    def release(self) -> None:
        """Let go of everything but pixels that wait to be taken."""
        self.contexts, self.tokens, self.velocity, self.decode = (), None, None, None
        self.adapters, self.deltas = NO_ADAPTERS, None
        self.modulation.release()


@contextmanager
def all_or_none(states: Iterable[DeviceState]) -> Iterator[None]:
    """Steps within are done by all of these, or where something fails, by none."""
    before = [(state, state.tokens, state.velocity, state.step) for state in states]
    try:
        yield
    except BaseException:
        for state, tokens, velocity, step in before:
            state.tokens, state.velocity, state.sequence.step = tokens, velocity, step
        raise
