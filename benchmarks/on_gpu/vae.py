"""VAE decode, ours against the 3-D decoder as it was released."""

import torch

from benchmarks.on_gpu.context import Context
from benchmarks.on_gpu.correctness import relative
from benchmarks.on_gpu.plain_vae import Decoder3D
from benchmarks.on_gpu.rows import Row, timed
from benchmarks.on_gpu.timing import timings

SIDES = (1024, 2048)


def run(context: Context) -> None:
    """Times, and that both give the same pixels."""
    vae = context.vae
    original = Decoder3D(vae)
    generator = torch.Generator(context.device).manual_seed(11)
    for side in (64,) if context.smoke else SIDES:
        latents = torch.randn(16, side // 8, side // 8, generator=generator, device=context.device)
        ours, theirs = (
            lambda x=latents: vae.decode(x[None])[0],
            lambda x=latents: original(x),
        )
        difference = relative(ours(), theirs())
        context.findings.rows.append(
            Row("vae", f"{side}x{side} difference", difference, "relative error")
        )
        pair = timings([ours, theirs], context.device, context.seconds)
        for how, timing in zip(("ours", "3-D original"), pair, strict=True):
            context.findings.rows.append(timed("vae", f"{side}x{side} {how}", timing))
