"""Configurations that generate: our runner, Diffusers, or a server."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from krea2_bench.quality.cases import Case
from krea2_srt.errors import Krea2Error
from krea2_srt.request import ImageRequest
from krea2_srt.runner.config import DTYPES

if TYPE_CHECKING:
    import torch

SYNTAX = (
    "ours[:dtype=bfloat16|float32][:quantization=int8|fp8|int8_unrotated|fp8_rotated][:pack=N], "
    "diffusers[:dtype=…], or a server's URL"
)


class GeneratorError(Krea2Error):
    """A configuration that cannot generate; the message says what is wrong with it."""


class ImageGenerator(Protocol):
    """Generates cases in order, uint8 [height, width, 3] each."""

    def generate(self, cases: Sequence[Case]) -> Iterator[np.ndarray]: ...


def parse_generator(text: str, checkpoint: Path) -> ImageGenerator:
    """Read a configuration as `SYNTAX` says.

    Raises:
        GeneratorError: it is none.
    """
    if text.startswith(("http://", "https://")):
        return ServerGenerator(text)
    kind, *options = text.split(":")
    values: dict[str, str] = {}
    for option in options:
        name, _, values[name] = option.partition("=")
    dtype = values.pop("dtype", "bfloat16")
    if dtype not in DTYPES:
        raise GeneratorError(f"{text!r}: dtype must be one of {', '.join(DTYPES)}")
    generator: ImageGenerator
    match kind:
        case "ours":
            pack = values.pop("pack", "1")
            if not pack.isdecimal() or not int(pack):
                raise GeneratorError(f"{text!r}: pack must be a whole number from 1 on")
            generator = OurGenerator(checkpoint, dtype, values.pop("quantization", ""), int(pack))
        case "diffusers":
            generator = DiffusersGenerator(checkpoint, dtype)
        case _:
            raise GeneratorError(f"{text!r} is no configuration; expected {SYNTAX}")
    if values:
        raise GeneratorError(f"{text!r}: {next(iter(values))} is not known; expected {SYNTAX}")
    return generator


class OurGenerator:
    """Our model runner.

    Args:
        checkpoint: folder.
        dtype: of the computation.
        quantization: of the DiT's matrices, one of `FORMATS`; "" is none.
        pack: pictures that share each forward.
    """

    def __init__(self, checkpoint: Path, dtype: str, quantization: str, pack: int) -> None:
        from krea2_bench.eight_bits import FORMATS

        if quantization and quantization not in FORMATS:
            raise GeneratorError(f"quantization {quantization!r} is not known; expected {SYNTAX}")
        self._checkpoint, self._dtype, self._pack = checkpoint, dtype, pack
        self._quantization = FORMATS.get(quantization)

    def generate(self, cases: Sequence[Case]) -> Iterator[np.ndarray]:
        from krea2_srt.offline import Krea2

        model = Krea2.load(self._checkpoint, dtype=self._dtype, quantization=self._quantization)
        requests = [
            ImageRequest(c.prompt, c.width, c.height, c.steps, c.guidance, seed=c.seed)
            for c in cases
        ]
        yield from model.images(requests, pack=self._pack)


class DiffusersGenerator:
    """``diffusers.Krea2Pipeline``, one picture at a time."""

    def __init__(self, checkpoint: Path, dtype: str) -> None:
        self._checkpoint, self._dtype = checkpoint, dtype

    def generate(self, cases: Sequence[Case]) -> Iterator[np.ndarray]:
        import torch
        from diffusers import Krea2Pipeline

        device = _device()
        pipeline = Krea2Pipeline.from_pretrained(
            self._checkpoint, dtype=getattr(torch, self._dtype)
        ).to(device)
        pipeline.set_progress_bar_config(disable=True)
        for case in cases:
            image = pipeline(
                case.prompt,
                height=case.height,
                width=case.width,
                num_inference_steps=case.steps,
                guidance_scale=case.guidance,
                # As ours and SGLang's: noise is the device's, and a GPU's differs from a CPU's.
                generator=torch.Generator(device).manual_seed(case.seed),
            ).images[0]
            yield np.asarray(image.convert("RGB"))


class ServerGenerator:
    """An OpenAI-style images server."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")

    def generate(self, cases: Sequence[Case]) -> Iterator[np.ndarray]:
        import httpx
        import pybase64
        from PIL import Image

        with httpx.Client(timeout=600) as client:
            for case in cases:
                fields: dict[str, Any] = {
                    "prompt": case.prompt,
                    "size": f"{case.width}x{case.height}",
                    "num_inference_steps": case.steps,
                    "seed": case.seed,
                    "response_format": "b64_json",
                    "output_format": "png",
                }
                if case.guidance:
                    fields["guidance_scale"] = case.guidance
                try:
                    answer = client.post(f"{self._url}/v1/images/generations", json=fields)
                    answer.raise_for_status()
                    data = pybase64.b64decode(answer.json()["data"][0]["b64_json"])
                except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
                    raise GeneratorError(f"{self._url} generated no picture: {error}") from None
                yield np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _device() -> "torch.device":
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
