"""A step of ours against the same in plain PyTorch, and in torch.compile; in turn, in one run."""

import time
from collections.abc import Callable

import torch

from krea2_bench.gpu.context import Context
from krea2_bench.gpu.plain_dit import PlainDiT
from krea2_bench.gpu.rows import timed
from krea2_bench.gpu.sequences import images, name_of
from krea2_bench.gpu.steps import SMOKE_SIDES, Way, ways
from krea2_bench.gpu.timing import timings
from krea2_srt.runner.device_state import DeviceState
from krea2_srt.runner.packing import ForwardBatch

SIDES = (1024, 256, 512, 2048)
COMPILED_SIDES = (256, 1024, 512)


def run(context: Context) -> None:
    """Against plain PyTorch."""
    plain = PlainDiT(context.dit)
    for side in SMOKE_SIDES if context.smoke else SIDES:
        with context.findings.attempt("plain", name_of(side)):
            _against(context, "plain", "plain", plain, side)


def run_compiled(context: Context) -> None:
    """Against torch.compile, one block at a time, as Diffusers advises: a graph per size."""
    compiled = PlainDiT(context.dit)
    if not context.smoke:  # for a CPU it would be another program, and take a minute
        for block in compiled.blocks:
            block.compile(dynamic=False)
    for side in SMOKE_SIDES[:1] if context.smoke else COMPILED_SIDES:
        with context.findings.attempt("compile", name_of(side)):
            start = time.perf_counter()
            (state,) = images(context.runner, ((side, side),))
            _plain(context, compiled, state)
            note = f"compiled in {time.perf_counter() - start:.1f} s"
            _against(context, "compile", "compiled", compiled, side, note)


def _against(
    context: Context, part: str, name: str, other: PlainDiT, side: int, note: str = ""
) -> None:
    (state,) = images(context.runner, ((side, side),))
    size = name_of(side)
    works = ways(context, part, context.runner, [state], f"{size} ")
    works.append(Way(f"{size} {name}", "eager, sdpa", _call(context, other, state)))
    found = timings([way.run for way in works], context.device, context.seconds, warm_ups=2)
    floor = context.step_floor_ms([state.num_tokens])
    for way, timing in zip(works, found, strict=True):
        said = note if way is works[-1] else ""
        context.findings.add(timed(part, way.name, timing, floor, said, way.how))


def _call(context: Context, other: PlainDiT, state: DeviceState) -> Callable[[], object]:
    return lambda: _plain(context, other, state)


def _plain(context: Context, plain: PlainDiT, state: DeviceState) -> None:
    rope = context.runner.packs.get(ForwardBatch.of([state]).shapes).rope
    sigmas = state.schedule.sigmas
    velocity = plain(state.tokens, state.contexts[0], sigmas[0], rope)
    stepped = state.tokens + (sigmas[1] - sigmas[0]) * velocity.float()
    torch.isfinite(stepped).all().item()
