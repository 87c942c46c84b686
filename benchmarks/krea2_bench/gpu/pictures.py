"""Whole pictures, from a prompt to pixels, and the memory that they took."""

import torch

from krea2_bench.gpu.context import Context
from krea2_bench.gpu.graphs import how_it_runs, why_eager
from krea2_bench.gpu.rows import LEFT_OUT, Missing, Row, timed
from krea2_bench.gpu.sequences import images, name_of
from krea2_bench.gpu.timing import timings
from krea2_srt.errors import ConfigError, first_line
from krea2_srt.request import ImageRequest
from krea2_srt.runner.model_runner import Krea2Runner

SIDES, LARGE_SIDES = (1024, 512, 256), (2048,)
WHOLE_SIDE = 256
"""Up to which a server runs all steps of a lone picture as one graph."""

PROMPT = "a red fox sitting in fresh snow at golden hour, photorealistic, shallow depth of field"


def run(context: Context) -> None:
    """A new prompt each time, so that no cache of prompts helps."""
    _generate_all(context, (32,) if context.smoke else SIDES, ("fp8", "int8"))
    if context.on_gpu:
        peak = torch.cuda.max_memory_reserved(context.device) / 2**30
        note = "all models of this benchmark, bf16, fp8 and int8"
        context.findings.add(Row("pictures", "memory reserved", peak, "GiB", note=note))


def run_large(context: Context) -> None:
    """The same of those that take seconds each; int8 has fp8's time, as far as one knows."""
    _generate_all(context, (64,) if context.smoke else LARGE_SIDES, ("fp8",))


def _generate_all(context: Context, sides: tuple[int, ...], formats: tuple[str, ...]) -> None:
    runners = {"bf16": context.runner}
    runners |= {format: context.quantized_runner(format) for format in formats}
    try:
        fp8 = context.runner_of(runners["fp8"].dit, context.fp8_attention())
        runners["fp8, fp8 attention"] = fp8
    except ConfigError as error:
        reason = first_line(error)
        context.findings.miss(
            Missing("pictures", f"{name_of(sides[0])} with fp8 attention", LEFT_OUT, reason)
        )
    for runner in runners.values():
        context.whole(runner)
        context.use_graphs(runner)
        runner.use_text_graphs(context.text_capture)
    for side in sides:
        works = [lambda r=runner, s=side: _generate(r, s) for runner in runners.values()]
        with context.findings.attempt("pictures", name_of(side)):
            hows = {name: _how(runner, side) for name, runner in runners.items()}
            long = side >= 2048
            warm_ups, least = 1 if long else 2, 1 if long or context.smoke else 3
            found = timings(works, context.device, context.seconds, 10, warm_ups, least)
            for name, timing in zip(runners, found, strict=True):
                what = f"{name_of(side)} {name}"
                context.findings.add(timed("pictures", what, timing, how=hows[name]))


def _how(runner: Krea2Runner, side: int) -> str:
    """How the steps of a picture run, and why if not on a graph."""
    states = images(runner, ((side, side),))
    reason = why_eager(runner, states)
    how = how_it_runs(runner, states[0].num_tokens, graph=not reason)
    return f"{how}: {reason}" if reason else how


def _generate(runner: Krea2Runner, side: int) -> None:
    runner.contexts.clear()
    image = ImageRequest(PROMPT, side, side, runner.sampling.default_steps, seed=1)
    state = runner.start(image, runner.encode(image.prompts))
    if side <= WHOLE_SIDE:
        runner.step([state], image.steps)
    while not state.done:
        runner.step([state])
    runner.decode(state)
