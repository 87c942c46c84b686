"""Whole pictures, from a prompt to pixels, and the memory that they took."""

import torch

from benchmarks.on_gpu.context import Context
from benchmarks.on_gpu.rows import Row, timed
from benchmarks.on_gpu.steps import name_of, use_graphs
from benchmarks.on_gpu.timing import timings
from krea2_srt.runner.model_runner import Krea2Runner

SIDES = (256, 512, 1024, 2048)
PROMPT = "a red fox sitting in fresh snow at golden hour, photorealistic, shallow depth of field"


def run(context: Context) -> None:
    """A new prompt each time, so that no cache of prompts helps."""
    use_graphs(context)
    runners = {"bf16": context.runner, "fp8": context.fp8_runner}
    for side in (32,) if context.smoke else SIDES:
        works = [lambda r=runner, s=side: _draw(r, s) for runner in runners.values()]
        with context.findings.attempt(f"pictures: {name_of(side)}"):
            found = timings(works, context.device, 2 * context.seconds, repeats=10)
            for how, timing in zip(runners, found, strict=True):
                context.findings.rows.append(timed("pictures", f"{name_of(side)} {how}", timing))
    if context.device.type == "cuda":
        peak = torch.cuda.max_memory_reserved(context.device) / 2**30
        note = "all models of this benchmark, bf16 and fp8"
        context.findings.rows.append(Row("pictures", "memory reserved", peak, "GiB", note=note))


def _draw(runner: Krea2Runner, side: int) -> None:
    runner.contexts.clear()
    (prompt,) = runner.encode([PROMPT])
    schedule = runner.schedule(runner.recipe.default_steps, side, side)
    sequence = runner.start(prompt, side, side, 1, schedule)
    runner.step([sequence], schedule.steps)
    runner.decode(sequence)
