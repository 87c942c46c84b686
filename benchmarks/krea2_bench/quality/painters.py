"""Configurations that draw: our runner, Diffusers, or a server."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from krea2_srt.errors import Krea2Error

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float32")
SYNTAX = (
    "ours[:dtype=bfloat16|float32][:quantization=fp8|fp8_rotated|int8|int8_rotated][:pack=N], "
    "diffusers[:dtype=…], or a server's URL"
)


class PainterError(Krea2Error):
    """A configuration that cannot draw; the message says what is wrong with it."""


@dataclass(frozen=True)
class Sketch:
    """What to draw.

    Attributes:
        prompt, seed: of the picture.
        width, height: pixels.
        steps: denoising steps.
        guidance: Krea's scale; 0 is off.
    """

    prompt: str
    seed: int
    width: int
    height: int
    steps: int
    guidance: float = 0.0


class Painter(Protocol):
    """Draws sketches in order, uint8 [height, width, 3] each."""

    def draw(self, sketches: Sequence[Sketch]) -> Iterator[np.ndarray]: ...


def parse_painter(text: str, checkpoint: Path) -> Painter:
    """Read a configuration as `SYNTAX` says.

    Raises:
        PainterError: it is none.
    """
    if text.startswith(("http://", "https://")):
        return ServerPainter(text)
    kind, *options = text.split(":")
    values: dict[str, str] = {}
    for option in options:
        name, _, values[name] = option.partition("=")
    dtype = values.pop("dtype", "bfloat16")
    if dtype not in DTYPES:
        raise PainterError(f"{text!r}: dtype must be one of {', '.join(DTYPES)}")
    painter: Painter
    match kind:
        case "ours":
            pack = values.pop("pack", "1")
            if not pack.isdecimal() or not int(pack):
                raise PainterError(f"{text!r}: pack must be a whole number from 1 on")
            painter = OurPainter(checkpoint, dtype, values.pop("quantization", ""), int(pack))
        case "diffusers":
            painter = DiffusersPainter(checkpoint, dtype)
        case _:
            raise PainterError(f"{text!r} is no configuration; expected {SYNTAX}")
    if values:
        raise PainterError(f"{text!r}: {next(iter(values))} is not known; expected {SYNTAX}")
    return painter


class OurPainter:
    """Our model runner.

    Args:
        checkpoint: folder.
        dtype: of the computation.
        quantization: of the DiT's matrices; "" is none.
        pack: pictures that share each forward.
    """

    def __init__(self, checkpoint: Path, dtype: str, quantization: str, pack: int) -> None:
        import torch

        from krea2_srt.model.quantization import Quantization

        self._checkpoint, self._pack = checkpoint, pack
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._quantization = None
        if quantization:
            name, _, rotated = quantization.partition("_")
            if name not in ("fp8", "int8") or rotated not in ("", "rotated"):
                raise PainterError(f"quantization {quantization!r} is not known; expected {SYNTAX}")
            self._quantization = Quantization(name, bool(rotated))

    def draw(self, sketches: Sequence[Sketch]) -> Iterator[np.ndarray]:
        import torch

        from krea2_srt.model.checkpoint import Krea2Checkpoint
        from krea2_srt.model.pixels import to_uint8
        from krea2_srt.runner.model_runner import Krea2Runner

        checkpoint = Krea2Checkpoint.from_folder(self._checkpoint)
        runner = Krea2Runner.load(
            checkpoint, _device(), self._dtype, quantization=self._quantization
        )
        with torch.inference_mode():
            for at in range(0, len(sketches), self._pack):
                pack = [_begun(runner, sketch) for sketch in sketches[at : at + self._pack]]
                while any(not sequence.done for sequence in pack):
                    runner.step([sequence for sequence in pack if not sequence.done])
                for sequence in pack:
                    yield to_uint8(runner.decode(sequence))


def _begun(runner: Any, sketch: Sketch) -> Any:
    contexts = runner.encode([sketch.prompt, ""] if sketch.guidance else [sketch.prompt])
    return runner.start(
        contexts[0],
        sketch.width,
        sketch.height,
        sketch.seed,
        runner.schedule(sketch.steps, sketch.width, sketch.height),
        sketch.guidance,
        contexts[1] if sketch.guidance else None,
    )


class DiffusersPainter:
    """``diffusers.Krea2Pipeline``, one picture at a time."""

    def __init__(self, checkpoint: Path, dtype: str) -> None:
        self._checkpoint, self._dtype = checkpoint, dtype

    def draw(self, sketches: Sequence[Sketch]) -> Iterator[np.ndarray]:
        import torch
        from diffusers import Krea2Pipeline

        pipeline = Krea2Pipeline.from_pretrained(
            self._checkpoint, dtype=getattr(torch, self._dtype)
        ).to(_device())
        pipeline.set_progress_bar_config(disable=True)
        for sketch in sketches:
            image = pipeline(
                sketch.prompt,
                height=sketch.height,
                width=sketch.width,
                num_inference_steps=sketch.steps,
                guidance_scale=sketch.guidance,
                # As everywhere here: noise is drawn on the CPU.
                generator=torch.Generator().manual_seed(sketch.seed),
            ).images[0]
            yield np.asarray(image.convert("RGB"))


class ServerPainter:
    """An OpenAI-style images server."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")

    def draw(self, sketches: Sequence[Sketch]) -> Iterator[np.ndarray]:
        import httpx
        import pybase64
        from PIL import Image

        with httpx.Client(timeout=600) as client:
            for sketch in sketches:
                fields: dict[str, Any] = {
                    "prompt": sketch.prompt,
                    "size": f"{sketch.width}x{sketch.height}",
                    "num_inference_steps": sketch.steps,
                    "seed": sketch.seed,
                    "response_format": "b64_json",
                    "output_format": "png",
                }
                if sketch.guidance:
                    fields["guidance_scale"] = sketch.guidance
                try:
                    answer = client.post(f"{self._url}/v1/images/generations", json=fields)
                    answer.raise_for_status()
                    data = pybase64.b64decode(answer.json()["data"][0]["b64_json"])
                except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
                    raise PainterError(f"{self._url} drew no picture: {error}") from None
                yield np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _device() -> "torch.device":
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
