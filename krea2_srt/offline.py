"""Krea 2 in this process: load it once, generate images; no server, and no scheduler.

::

    from krea2_srt import Krea2

    model = Krea2.load("krea/Krea-2-Turbo")
    (image,) = model.generate("a red fox in fresh snow", size=(1024, 1024), seed=7)
    image.save("fox.png")
"""

import gc
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event

import numpy as np
import torch
from PIL import Image

from krea2_srt.engine.config import EngineConfig
from krea2_srt.environment import read_environment
from krea2_srt.errors import ConfigError, RequestCancelledError, RequestError
from krea2_srt.lora.scaled_files import ScaledFile
from krea2_srt.messages import preview_steps
from krea2_srt.model.checkpoint import Krea2Checkpoint, SamplingDefaults
from krea2_srt.model.hub import find_checkpoint
from krea2_srt.model.quantization import Quantization, served
from krea2_srt.request import (
    MAX_ADAPTER_SCALE,
    MAX_ADAPTERS,
    SIZE_MULTIPLE,
    AdapterUse,
    ImageRequest,
    RequestLimits,
    check_number,
    fit_size,
)
from krea2_srt.runner.builder import RunnerBuilder
from krea2_srt.runner.config import DTYPES
from krea2_srt.runner.device_errors import device_errors
from krea2_srt.runner.generation import Generation
from krea2_srt.runner.model_runner import Krea2Runner
from krea2_srt.runner.packing import split_by_tokens


class GenerationCancelled(RequestCancelledError):
    """`cancel` was set before all images were done."""


@dataclass(frozen=True)
class ImageProgress:
    """A step of an image is done.

    Attributes:
        index: of the image, among all that were asked for.
        step, total: steps done, of how many.
        preview: the picture as this step predicts it, at most 256 x 256, where one is due.
    """

    index: int
    step: int
    total: int
    preview: Image.Image | None = None


OnProgress = Callable[[ImageProgress], object]

Lora = str | os.PathLike[str] | Mapping[str | os.PathLike[str], float]
"""A file or folder of an adapter, at scale 1, or several with a scale each."""


class Krea2:
    """A loaded checkpoint. Not for several threads at a time.

    Args:
        runner: runs its parts.
        config: limits of requests and of packs.
    """

    def __init__(self, runner: Krea2Runner, config: EngineConfig | None = None) -> None:
        self.runner = runner
        self.config = config or EngineConfig()

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] | Krea2Checkpoint,
        *,
        text_encoder: str | os.PathLike[str] | None = None,
        vae: str | os.PathLike[str] | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
        recipe: str | None = None,
        device: str | torch.device = "auto",
        dtype: str = "bfloat16",
        quantization: Quantization | str | None = None,
        lora_merge: Lora | None = None,
    ) -> "Krea2":
        """Load a checkpoint, and download what of it is not on disk.

        The environment's ``KREA2_SRT_*`` settings hold here too; see docs/gpu.md.

        Args:
            model: a folder in the released layout, a single file of the transformer, a repo id,
                or what `krea2_srt.model.hub.find_checkpoint` has found, which takes none of the
                following four.
            text_encoder, vae: a folder, a single file or a repo id, in place of the model's own
                or, for a single file, of the released one's.
            tokenizer: its folder; by default the one beside the text encoder or of the model.
            recipe: ``turbo`` or ``raw``, whatever the model says of itself.
            device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:1``.
            dtype: ``bfloat16`` or ``float32``.
            quantization: of the transformer's matrices: ``int8``, ``fp8``, or any other that
                `Quantization` can say.
            lora_merge: adapters that are added to the weights for good, before these are
                quantised: images take no longer, and none can do without them.

        Raises:
            AdapterError: an adapter cannot be read, or is another model's.
            CheckpointError: nothing there, or not a Krea 2 checkpoint.
            ConfigError: it does not fit, or a setting is wrong.
            RequestError: there is no such device.
        """
        if dtype not in DTYPES:
            raise ConfigError(f"dtype: must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if isinstance(quantization, str):
            quantization = served(quantization)
        chosen = device if isinstance(device, torch.device) else device_of(device)
        environment, kind = read_environment(), getattr(torch, dtype)
        parts = {"text_encoder": text_encoder, "vae": vae, "tokenizer": tokenizer}
        given = {name: os.fspath(path) for name, path in parts.items() if path is not None}
        if isinstance(model, Krea2Checkpoint):
            if given or recipe is not None:
                name = next(iter(given), "recipe")
                raise ConfigError(f"{name}: has no effect on a checkpoint that was found already")
            found = model
        else:
            found = find_checkpoint(
                os.fspath(model),
                recipe=recipe or environment.runner.recipe,
                text_encoder=given.get("text_encoder"),
                vae=given.get("vae"),
                tokenizer=given.get("tokenizer"),
            )
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
            merged=tuple(_scales(lora_merge, "lora_merge")),
        )
        # What an earlier model has left to the allocator counts as taken where memory is planned.
        gc.collect()
        torch.cuda.empty_cache()  # does nothing where there is no CUDA
        plan = builder.plan()
        return cls(builder.load(plan), builder.within(plan))

    @property
    def sampling(self) -> SamplingDefaults:
        """Steps, guidance and size where a request names none."""
        return self.runner.sampling

    @property
    def limits(self) -> RequestLimits:
        """The largest request that is accepted."""
        return self.config.limits

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        size: tuple[int, int] | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        negative_prompt: str = "",
        seed: int = 0,
        num_images: int = 1,
        mu: float | None = None,
        lora: Lora | None = None,
        pack: int | None = None,
        previews: int = 0,
        on_progress: OnProgress | None = None,
        cancel: Event | None = None,
    ) -> list[Image.Image]:
        """Images of one prompt or of many: all of the first one, then all of the second one.

        Args:
            prompt: what to generate.
            size: width and height in pixels. Off the grid of 16 pixels they are rounded up, and
                scaled down where that is too large, with a warning of Python's.
            steps, guidance, mu: see `ImageRequest`. What is None is the checkpoint's own.
            negative_prompt: what guidance steers away from; unused without guidance.
            seed: of the first image of each prompt; its further ones have seed + 1 and so on, as a
                server's.
            num_images: of each prompt.
            lora: see `load_lora`.
            pack, previews, on_progress, cancel: see `images`.

        Raises:
            RequestError: naming the argument that is wrong, before anything is computed.
            AdapterError: an adapter cannot be read, or is another model's.
            GenerationCancelled: see `images`, which gives those that are done by then.
            OutOfMemoryError: of the device.
        """
        defaults = self.sampling
        width, height = (defaults.default_side,) * 2 if size is None else self._fitted(size)
        adapters = self.load_lora(lora) if lora is not None else frozenset()
        requests = [
            ImageRequest(
                text,
                width,
                height,
                defaults.default_steps if steps is None else steps,
                defaults.default_guidance if guidance is None else guidance,
                negative_prompt,
                seed,
                num_images,
                mu,
                adapters,
            )
            for text in _texts(prompt)
        ]
        for number, request in enumerate(requests):
            at = "prompt" if isinstance(prompt, str) else f"prompt[{number}]"
            names = {"width": "size[0]", "height": "size[1]", "prompt": at, "adapters": "lora"}
            try:
                request.check(self.limits)
            except RequestError as error:
                raise error.renamed(names.get(error.field, error.field)) from None
        images = self.images(
            requests, pack=pack, previews=previews, on_progress=on_progress, cancel=cancel
        )
        return [Image.fromarray(pixels) for pixels in images]

    def load_lora(self, lora: Lora) -> frozenset[AdapterUse]:
        """Adapters for `ImageRequest.adapters`: read, and put on the device.

        Files that are known and have not changed are not read again. Images with different
        adapters, or without, can be in one pack.

        Args:
            lora: ``"sepia.safetensors"``, or ``{"sepia.safetensors": 0.8, "ink.safetensors": 0.5}``
                with at most four: files of any common trainer, or folders of PEFT's.

        Raises:
            AdapterError: one cannot be read, or is another model's.
            RequestError: a scale is no number, or two are the same adapter.
            OutOfMemoryError: of the device.
        """
        uses: dict[str, AdapterUse] = {}
        for path, scale, _ in _scales(lora, "lora"):
            with device_errors(), self.runner.on_stream():
                placed = self.runner.adapters.load(path)
            if placed.digest in uses:
                raise RequestError("lora", f"{path} and another one are the same adapter")
            uses[placed.digest] = AdapterUse(placed.name, placed.digest, scale)
        return frozenset(uses.values())

    def _fitted(self, size: tuple[int, int]) -> tuple[int, int]:
        asked = _sides(size)
        fitted = fit_size(*asked, self.limits)
        if fitted != asked:
            text = "size: {}x{} is generated as {}x{}".format(*asked, *fitted)
            warnings.warn(text, stacklevel=3)
        return fitted

    def images(
        self,
        requests: Sequence[ImageRequest],
        *,
        pack: int | None = None,
        previews: int = 0,
        on_progress: OnProgress | None = None,
        cancel: Event | None = None,
    ) -> Iterator[np.ndarray]:
        """uint8 [height, width, 3] of each image of each request, in order, as they are done.

        Args:
            requests: all are checked before the first is begun.
            pack: most images that step together; None is as many as the device's memory allows. An
                image does not depend on the others.
            previews: how many small pictures `on_progress` gets of each image, evenly spread.
            on_progress: called after each step of each image.
            cancel: once it is set, by `on_progress` or by another thread, nothing more is begun.

        Raises:
            RequestError: naming what is wrong; by the call itself.
            AdapterError: one is not loaded, by the call itself; or its file is another since.
            GenerationCancelled: `cancel` was set; the model is as usable as before.
            OutOfMemoryError: of the device.
        """
        for request in requests:
            request.check(self.limits)
            self.runner.adapters.check(request.adapters)
        most = min(self.config.max_pack_sequences, self.config.max_active_sequences)
        if pack is not None:
            _check_whole("pack", pack, 1)
            most = min(pack, most)
        _check_whole("previews", previews, 0)
        if previews and on_progress is None:
            raise RequestError("previews", "has no effect without on_progress")
        singles = [single for request in requests for single in request.singles()]
        return self._generate(singles, most, previews, on_progress or _nobody, cancel or Event())

    def _generate(
        self,
        images: Sequence[ImageRequest],
        most: int,
        previews: int,
        on_progress: OnProgress,
        cancel: Event,
    ) -> Iterator[np.ndarray]:
        done, max_tokens = 0, self.config.max_pack_tokens
        for group in _groups(images, most, max_tokens):
            _check_cancel(cancel, done, images)
            generation = Generation(self.runner, group, previews > 0)
            numbers = {state: done + place for place, state in enumerate(generation.states)}
            while generation.pending:
                for pack in generation.packs(max_tokens):
                    _check_cancel(cancel, done, images)
                    generation.step(pack)
                    for state in pack:
                        total, preview = state.schedule.steps, None
                        if state.step in preview_steps(total, previews):
                            preview = Image.fromarray(generation.preview(state))
                        on_progress(ImageProgress(numbers[state], state.step, total, preview))
            for state in generation.states:
                _check_cancel(cancel, done, images)
                yield generation.pixels(state)
                done += 1


def _groups(
    images: Sequence[ImageRequest], most: int, max_tokens: int
) -> Iterator[Sequence[ImageRequest]]:
    """Those that are generated together: as many as fit into one forward by what they are expected
    to take, so that the first ones are done before the last ones are begun.
    """
    for fitting in split_by_tokens([sum(image.estimated_tokens) for image in images], max_tokens):
        for start in range(fitting.start, fitting.stop, most):
            yield images[start : min(start + most, fitting.stop)]


def _texts(prompt: str | Sequence[str]) -> list[str]:
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, Sequence):
        raise RequestError(
            "prompt", f"must be text or a list of texts, got {type(prompt).__name__}"
        )
    return list(prompt)


def _scales(lora: Lora | None, field: str) -> list[ScaledFile]:
    if lora is None:
        return []
    if isinstance(lora, (str, os.PathLike)):
        return [ScaledFile(Path(lora))]
    if not isinstance(lora, Mapping):
        raise RequestError(field, f"must be a path, or scales by paths, got {type(lora).__name__}")
    if len(lora) > MAX_ADAPTERS:
        raise RequestError(field, f"must be at most {MAX_ADAPTERS}, got {len(lora)}")
    for path, scale in lora.items():
        if not isinstance(path, (str, os.PathLike)):
            raise RequestError(field, f"must be scales by paths, got {path!r}")
        check_number(f"{field}[{os.fspath(path)!r}]", scale, -MAX_ADAPTER_SCALE, MAX_ADAPTER_SCALE)
    return [ScaledFile(Path(path), float(scale)) for path, scale in lora.items()]


def _sides(size: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(size, Sequence) or isinstance(size, str) or len(size) != 2:
        raise RequestError("size", f"must be (width, height) in pixels, got {size!r}")
    for place, side in enumerate(size):
        _check_whole(f"size[{place}]", side, SIZE_MULTIPLE)
    return size[0], size[1]


def _check_whole(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestError(name, f"must be a whole number, got {value!r}")
    if value < least:
        raise RequestError(name, f"must be {least} or greater, got {value}")


def _check_cancel(cancel: Event, done: int, images: Sequence[ImageRequest]) -> None:
    if cancel.is_set():
        raise GenerationCancelled(f"cancelled with {done} of {len(images)} images done")


def _nobody(_progress: ImageProgress) -> None:
    """What nobody wants to know is told to."""


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
