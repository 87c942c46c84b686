"""Images that are generated together: the one loop of encode, step, decode without a scheduler."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from krea2_srt.engine.lifecycle import lone_sequence
from krea2_srt.model.pixels import to_uint8
from krea2_srt.request import ImageRequest
from krea2_srt.runner.device_errors import device_errors
from krea2_srt.runner.device_state import DeviceState
from krea2_srt.runner.model_runner import Krea2Runner
from krea2_srt.runner.packing import split_by_tokens


class Generation:
    """Some images from their prompts to their pixels::

        while generation.pending:
            for pack in generation.packs(max_pack_tokens):
                generation.step(pack)
        images = [generation.pixels(state) for state in generation.states]

    Args:
        runner: runs the model.
        images: checked, each for one image.
        previews: whether `preview` is to be called.

    Attributes:
        states: of the images, in order.

    Raises:
        OutOfMemoryError: of the device, as its methods do.
    """

    def __init__(
        self, runner: Krea2Runner, images: Sequence[ImageRequest], previews: bool = False
    ) -> None:
        self._runner = runner
        sequences = [lone_sequence(image) for image in images]
        for sequence in sequences:
            sequence.wants_previews = previews
        with self._working():
            self.states = runner.encode_sequences(sequences)
            runner.begin(self.states)

    @property
    def pending(self) -> list[DeviceState]:
        """Those that have steps to do."""
        return [state for state in self.states if not state.done]

    def packs(self, max_tokens: int) -> Iterator[list[DeviceState]]:
        """One step of all that are pending, cut into forwards of at most so many tokens."""
        pending = self.pending
        for pack in split_by_tokens([state.num_tokens for state in pending], max_tokens):
            yield pending[pack.start : pack.stop]

    def step(self, pack: Sequence[DeviceState]) -> None:
        """One step of each in a pack."""
        with self._working():
            self._runner.step(pack)

    def preview(self, state: DeviceState) -> np.ndarray:
        """uint8 [height, width, 3], at most 256 x 256: the picture as its last step predicts it."""
        with self._working():
            latents = self._runner.predicted_latents(state)
            return to_uint8(self._runner.vae.decode(latents[None])[0])

    def pixels(self, state: DeviceState, tile: int | None = None) -> np.ndarray:
        """uint8 [height, width, 3] of an image that has done all steps.

        Args:
            state: which.
            tile: see `VAEDecoder.decode`; changes memory, not pixels.

        Raises:
            ModelError: there are NaNs or infinities in it.
        """
        with self._working():
            return to_uint8(self._runner.decode(state, tile))

    @contextmanager
    def _working(self) -> Iterator[None]:
        """On the runner's stream, with what the device raises as our errors."""
        with device_errors(), self._runner.on_stream(), torch.inference_mode():
            yield
