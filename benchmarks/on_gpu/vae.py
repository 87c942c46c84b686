"""VAE decode, ours against the 3-D decoder as it was released."""

from functools import partial

import torch
from torch import Tensor

from benchmarks.on_gpu.context import Context
from benchmarks.on_gpu.correctness import relative
from benchmarks.on_gpu.plain_vae import Decoder3D
from benchmarks.on_gpu.rows import Row, timed
from benchmarks.on_gpu.timing import timings
from krea2_srt.runner.vae import VAEDecoder

SIDES = (1024, 2048)


def run(context: Context) -> None:
    """Times, and that both give the same pixels."""
    vae = context.vae
    original = Decoder3D(vae)
    generator = torch.Generator(context.device).manual_seed(11)
    for side in (64,) if context.smoke else SIDES:
        latents = torch.randn(16, side // 8, side // 8, generator=generator, device=context.device)
        works = {"ours": partial(_decode, vae, latents)}
        # Another failure than of ours: it takes several times the memory.
        with context.findings.attempt(f"vae: 3-D original at {side}x{side}"):
            difference = relative(works["ours"](), original(latents))
            context.findings.rows.append(
                Row("vae", f"{side}x{side} difference", difference, "relative error")
            )
            works["3-D original"] = partial(original, latents)
        found = timings(list(works.values()), context.device, context.seconds)
        for how, timing in zip(works, found, strict=True):
            context.findings.rows.append(timed("vae", f"{side}x{side} {how}", timing))


def _decode(vae: VAEDecoder, latents: Tensor) -> Tensor:
    return vae.decode(latents[None])[0]
