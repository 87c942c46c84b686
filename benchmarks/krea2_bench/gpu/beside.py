"""A decode on a stream of its own beside steps: the same pixels, and what it costs the steps."""

import time
from statistics import median
from typing import Any

from krea2_bench.gpu.context import Context
from krea2_bench.gpu.correctness import check
from krea2_bench.gpu.rows import timed
from krea2_bench.gpu.sequences import images, name_of
from krea2_bench.gpu.stand_ins import Inline
from krea2_bench.gpu.steps import step
from krea2_bench.gpu.timing import Timing, timings, wait
from krea2_bench.gpu.vae import decoded, latents_of
from krea2_srt.model.pixels import quantize

SIDE, STEP_SIDE = 2048, 512
"""Sides of the picture that is decoded, and of the one that is stepped meanwhile."""


def run(context: Context) -> None:
    """Alone, then beside each other."""
    side, step_side = (64, 32) if context.smoke else (SIDE, STEP_SIDE)
    device, findings, runner, vae = context.device, context.findings, context.runner, context.vae
    latents = latents_of(context, side, side)
    sequences = images(runner, ((step_side, step_side),))
    context.use_graphs(runner)
    runner.prepare(sequences)
    decode, walk = f"decode of {name_of(side)}", f"step of {name_of(step_side)}"
    alone = quantize(decoded(vae, latents)).cpu()
    works = [lambda: decoded(vae, latents), lambda: step(runner, sequences)]
    by_itself = timings(works, device, context.seconds / 2, warm_ups=2)
    for what, timing in zip((decode, walk), by_itself, strict=True):
        findings.add(timed("beside", f"{what}, alone", timing))
    stream: Any = runner.side_stream or Inline()
    decodes, steps, begun, differ = [], [], time.monotonic(), 0.0
    for _ in range(2 if context.smoke else 5):
        wait(device)
        start = time.perf_counter()
        with runner.on_stream():  # of high priority, as in a server
            job = stream.start(lambda: (quantize(decoded(vae, latents)),), (latents,))
            found = None
            while found is None:
                before = time.perf_counter()
                step(runner, sequences)
                steps.append((time.perf_counter() - before) * 1e3)
                found = job.result()
        decodes.append((time.perf_counter() - start) * 1e3)
        differ = max(differ, float((found[0].cpu() != alone).sum()))
    span = (begun, time.monotonic())
    stream.close()
    findings.add(timed("beside", f"{decode}, beside steps", _timing(decodes, span)))
    findings.add(timed("beside", f"{walk}, beside decodes", _timing(steps, span)))
    check(context, "beside", "pixels that differ", differ, 0.0, "values")


def _timing(times: list[float], span: tuple[float, float]) -> Timing:
    return Timing(median(times), min(times), max(times), span)
