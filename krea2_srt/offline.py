"""Krea 2 in this process: load it once, generate images; no server, and no scheduler.

::

    from krea2_srt import Krea2

    model = Krea2.load("krea/Krea-2-Turbo")
    (image,) = model.generate("a red fox in fresh snow", seed=7)
    image.save("fox.png")
"""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from krea2_srt.engine.lifecycle import lone_sequence
from krea2_srt.environment import read_environment
from krea2_srt.errors import ConfigError, RequestError
from krea2_srt.model.checkpoint import Krea2Checkpoint, SamplingDefaults
from krea2_srt.model.hub import find_checkpoint
from krea2_srt.model.pixels import to_uint8
from krea2_srt.model.quantization import Quantization
from krea2_srt.request import ImageRequest, RequestLimits
from krea2_srt.runner.builder import RunnerBuilder
from krea2_srt.runner.config import DTYPES
from krea2_srt.runner.device_errors import device_errors
from krea2_srt.runner.model_runner import Krea2Runner


class Krea2:
    """A loaded checkpoint. Not for several threads at a time.

    Args:
        runner: runs its parts.
        limits: of requests.
    """

    def __init__(self, runner: Krea2Runner, limits: RequestLimits) -> None:
        self.runner = runner
        self.limits = limits

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] | Krea2Checkpoint,
        *,
        device: str | torch.device = "auto",
        dtype: str = "bfloat16",
        quantization: Quantization | None = None,
    ) -> "Krea2":
        """Load a checkpoint, and download what of it is not on disk.

        The environment's ``KREA2_SRT_*`` settings hold here too; see docs/gpu.md.

        Args:
            model: a folder in the released layout, an original single file, a repo id, or what
                `krea2_srt.model.hub.find_checkpoint` has found.
            device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:1``.
            dtype: ``bfloat16`` or ``float32``.
            quantization: of the transformer's matrices.

        Raises:
            CheckpointError: nothing there, or not a Krea 2 checkpoint.
            ConfigError: it does not fit, or a setting is wrong.
            RequestError: there is no such device.
        """
        if dtype not in DTYPES:
            raise ConfigError(f"dtype: must be one of {', '.join(DTYPES)}, got {dtype!r}")
        chosen = device if isinstance(device, torch.device) else device_of(device)
        found = model if isinstance(model, Krea2Checkpoint) else find_checkpoint(os.fspath(model))
        environment, kind = read_environment(), getattr(torch, dtype)
        builder = RunnerBuilder(
            found,
            chosen,
            kind,
            kind,
            kind,
            quantization,
            # Graphs for sizes that nobody may ask for would only take time.
            replace(environment.runner, warm_up_s=0.0),
            engine=environment.engine,
        )
        # What an earlier model has left to the allocator counts as taken where memory is planned.
        gc.collect()
        torch.cuda.empty_cache()  # does nothing where there is no CUDA
        plan = builder.plan()
        return cls(builder.load(plan), builder.within(plan).limits)

    @property
    def sampling(self) -> SamplingDefaults:
        """Steps, guidance and size where a request names none."""
        return self.runner.sampling

    def generate(
        self,
        prompt: str,
        *,
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        negative_prompt: str = "",
        seed: int = 0,
        num_images: int = 1,
        mu: float | None = None,
    ) -> list[Image.Image]:
        """Images of one prompt, with seeds seed, seed + 1 and so on, one after the other.

        Args:
            width, height: pixels, multiples of 16.
            steps, guidance, mu: see `ImageRequest`; None takes the checkpoint's own.

        Raises:
            RequestError: naming the argument that is wrong.
            OutOfMemoryError: of the device.
        """
        defaults = self.sampling
        request = ImageRequest(
            prompt,
            defaults.default_side if width is None else width,
            defaults.default_side if height is None else height,
            defaults.default_steps if steps is None else steps,
            defaults.default_guidance if guidance is None else guidance,
            negative_prompt,
            seed,
            num_images,
            mu,
        )
        return [Image.fromarray(pixels) for pixels in self.images([request])]

    def images(
        self,
        requests: Sequence[ImageRequest],
        pack: int = 1,
        on_step: Callable[[], object] | None = None,
    ) -> Iterator[np.ndarray]:
        """uint8 [height, width, 3] of each image of each request, in order.

        Args:
            requests: all are checked before the first is begun.
            pack: most images that step together; an image does not depend on the others.
            on_step: called after each step of each image.

        Raises:
            RequestError: naming the field that is wrong.
            OutOfMemoryError: of the device.
        """
        if pack < 1:
            raise RequestError("pack", f"must be 1 or greater, got {pack}")
        for request in requests:
            request.check(self.limits)
        singles = [single for request in requests for single in request.singles()]
        for at in range(0, len(singles), pack):
            with device_errors():
                images = self._pack(singles[at : at + pack], on_step)
            yield from images

    def _pack(
        self, requests: Sequence[ImageRequest], on_step: Callable[[], object] | None
    ) -> list[np.ndarray]:
        runner = self.runner
        with runner.on_stream(), torch.inference_mode():
            states = runner.encode_sequences([lone_sequence(request) for request in requests])
            runner.begin(states)
            while pending := [state for state in states if not state.done]:
                runner.step(pending)
                if on_step is not None:
                    for _ in pending:
                        on_step()
            return [to_uint8(runner.decode(state)) for state in states]


def device_of(name: str) -> torch.device:
    """The device of a name; ``auto`` is a GPU if there is one.

    Raises:
        RequestError: there is none of that name.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise RequestError("device", f"unknown device {name!r}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise RequestError("device", f"this machine has {torch.cuda.device_count()} CUDA GPUs")
    return torch.device(name)
