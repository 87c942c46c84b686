"""VAE decode: the first of a size, all others, and the 3-D decoder as it was released."""

from functools import partial

import torch
from torch import Tensor

from krea2_bench.gpu.context import Context
from krea2_bench.gpu.plain_vae import Decoder3D
from krea2_bench.gpu.rows import Row, timed
from krea2_bench.gpu.sequences import name_of, relative
from krea2_bench.gpu.timing import once, timings, wait
from krea2_srt.model.vae import VAEDecoder

SIZES = ((1024, 1024), (2048, 2048), (832, 1216))
"""Width and height."""

SIDES_3D = (1024, 2048)


def run(context: Context) -> None:
    """With convolutions as heuristics choose them, and as a search chooses them."""
    sizes = ((64, 64), (48, 64)) if context.smoke else SIZES
    before = torch.backends.cudnn.benchmark
    with context.findings.attempt("vae", "kernels and handles"):
        # Built in the first decode of all, whatever its size.
        decoded(context.vae, latents_of(context, 64, 64))
    try:
        # All without a search first: what it finds is kept, and would serve the others too.
        for searched in (False, True):
            torch.backends.cudnn.benchmark = searched
            for width, height in sizes:
                with context.findings.attempt("vae", name_of(width, height=height)):
                    _measure(context, width, height, searched)
    finally:
        torch.backends.cudnn.benchmark = before


def _measure(context: Context, width: int, height: int, searched: bool) -> None:
    vae, size = context.vae, name_of(width, height=height)
    how = "convolutions searched" if searched else "convolutions by heuristics"
    decode = partial(decoded, vae, latents_of(context, width, height))
    first, usual = ("first, searched", "searched") if searched else ("first", "ours")
    context.findings.add(timed("vae", f"{size} {first}", once(decode, context.device), how=how))
    (timing,) = timings([decode], context.device, context.seconds / 2, warm_ups=2)
    context.findings.add(timed("vae", f"{size} {usual}", timing, how=how))
    if context.on_gpu and not searched:
        torch.cuda.reset_peak_memory_stats(context.device)
        held = torch.cuda.memory_allocated(context.device)
        decode()
        wait(context.device)
        peak = (torch.cuda.max_memory_allocated(context.device) - held) / 2**30
        context.findings.add(Row("vae", f"{size} memory", peak, "GiB", note="beyond the weights"))


def run_3d(context: Context) -> None:
    """Times in turn, and that both give the same pixels."""
    vae = context.vae
    original = Decoder3D(vae)
    for side in (64,) if context.smoke else SIDES_3D:
        latents, size = latents_of(context, side, side), name_of(side)
        with context.findings.attempt("vae 3-D", size):
            difference = relative(decoded(vae, latents), original(latents))
            context.findings.add(Row("vae 3-D", f"{size} difference", difference, "relative error"))
            works = [partial(decoded, vae, latents), partial(original, latents)]
            found = timings(works, context.device, context.seconds, warm_ups=2)
            for what, timing in zip(("ours", "3-D original"), found, strict=True):
                context.findings.add(timed("vae 3-D", f"{size} {what}", timing))


def latents_of(context: Context, width: int, height: int) -> Tensor:
    """Random latents of a picture, [16, height / 8, width / 8]."""
    generator = torch.Generator(context.device).manual_seed(11)
    return torch.randn(16, height // 8, width // 8, generator=generator, device=context.device)


def decoded(vae: VAEDecoder, latents: Tensor) -> Tensor:
    """Pixels of one picture."""
    return vae.decode(latents[None])[0]
