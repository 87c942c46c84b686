"""One step, eagerly and on a graph, in bf16 and in 8 bits, at all sizes and in packs."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from krea2_bench.gpu.context import Context
from krea2_bench.gpu.graphs import how_it_runs, why_eager
from krea2_bench.gpu.rows import LEFT_OUT, Missing, Row, timed
from krea2_bench.gpu.sequences import images, name_of
from krea2_bench.gpu.timing import timings, wait
from krea2_srt.errors import ConfigError, first_line
from krea2_srt.runner.device_state import DeviceState
from krea2_srt.runner.model_runner import Krea2Runner
from krea2_srt.runner.packing import ForwardBatch

SIDES = (1024, 512, 2048, 256)
FP8_ATTENTION_SIDES = (2048, 1024)
"""Where attention is a good part of a step."""

INT8_SIDES = (1024, 2048)
OTHER_SIDES = (768, 1536)
PACKS = ((256, 8), (512, 4), (256, 13), (256, 25), (256, 51), (1024, 4))
"""Side and number of images; the last ones fill packs of 4k, 8k and 16k tokens."""

SMOKE_SIDES = (48, 32)


@dataclass(frozen=True)
class Way:
    """One way to run a step.

    Attributes:
        name: in the row.
        how: it runs: on a graph or eagerly, and with which attention.
        run: steps once.
    """

    name: str
    how: str
    run: Callable[[], object]


def run(context: Context) -> None:
    """In bf16; then what the host does while graphs replay."""
    for side in SMOKE_SIDES if context.smoke else SIDES:
        with context.findings.attempt("steps", name_of(side)):
            measure(context, "steps", context.runner, "", ((side, side),))
    for side in SMOKE_SIDES if context.smoke else (256, 512):
        with context.findings.attempt("steps", f"{name_of(side)} host"):
            _host_time(context, side)


def run_8_bit(context: Context) -> None:
    """The same in fp8."""
    for side in SMOKE_SIDES if context.smoke else SIDES:
        with context.findings.attempt("steps", f"{name_of(side)} fp8"):
            measure(context, "steps", context.quantized_runner("fp8"), "fp8 ", ((side, side),))
    try:
        attention = context.fp8_attention()
    except ConfigError as error:
        reason = first_line(error)
        context.findings.miss(Missing("steps", "fp8 with fp8 attention", LEFT_OUT, reason))
        return
    runner = context.runner_of(context.quantized_runner("fp8").dit, attention)
    for side in FP8_ATTENTION_SIDES:
        with context.findings.attempt("steps", f"{name_of(side)} fp8, fp8 attention"):
            measure(context, "steps", runner, "fp8, fp8 attention ", ((side, side),))


def run_int8(context: Context) -> None:
    """The same in int8 with rotation, at the sizes that have a target."""
    for side in SMOKE_SIDES if context.smoke else INT8_SIDES:
        with context.findings.attempt("steps", f"{name_of(side)} int8"):
            measure(context, "steps", context.quantized_runner("int8"), "int8 ", ((side, side),))


def run_packs(context: Context) -> None:
    """Sizes in between, and packs of several images."""
    for side in () if context.smoke else OTHER_SIDES:
        with context.findings.attempt("packs", name_of(side)):
            measure(context, "packs", context.runner, "", ((side, side),))
    for side, count in ((32, 3),) if context.smoke else PACKS:
        with context.findings.attempt("packs", name_of(side, count)):
            measure(context, "packs", context.runner, "", ((side, side),) * count)


def measure(
    context: Context,
    part: str,
    runner: Krea2Runner,
    format: str,
    sides: tuple[tuple[int, int], ...],
) -> None:
    """Eagerly and on a graph, in turn, so that a GPU that gets warmer slows both alike.

    Args:
        context: of the child.
        part: of the benchmark.
        runner: steps.
        format: of its matrices, as rows name it, with a space after it, and what else is in 8
            bits after a comma; empty is bf16.
        sides: width and height of every image.
    """
    states = images(runner, sides)
    size = name_of(sides[0][0], len(sides))
    branches = [state.num_tokens for state in states]
    works = ways(context, part, runner, states, f"{size} {format}")
    seconds, least = context.seconds, 2 if max(branches) > 8192 else 3
    found = timings([way.run for way in works], context.device, seconds, warm_ups=2, least=least)
    floor = context.step_floor_ms(branches, format.partition(",")[0].strip() or "bf16")
    for way, timing in zip(works, found, strict=True):
        note = f"{sum(branches)} tokens"
        context.findings.add(timed(part, way.name, timing, floor, note, way.how))


def ways(
    context: Context,
    part: str,
    runner: Krea2Runner,
    states: list[DeviceState],
    name: str,
) -> list[Way]:
    """Eagerly, and on a graph where one can be captured; else the reason is noted."""
    tokens = sum(state.num_tokens for state in states)
    how = how_it_runs(runner, tokens, graph=False)
    eager = Way(f"{name}eager", how, lambda: _eager(runner, states))
    context.use_graphs(runner)
    wait(context.device)
    before, start = _reserved(context), time.perf_counter()
    reason = why_eager(runner, states)
    wait(context.device)
    if reason:
        context.findings.miss(Missing(part, f"{name}graph", LEFT_OUT, f"ran eagerly: {reason}"))
        return [eager]
    ms, taken = (time.perf_counter() - start) * 1e3, (_reserved(context) - before) / 2**20
    note = f"takes {taken:.0f} MiB more" if context.on_gpu else ""
    how = how_it_runs(runner, tokens, graph=True)
    context.findings.add(Row(part, f"{name}capture", ms, "ms", note=note, how=how))
    return [eager, Way(f"{name}graph", how, lambda: step(runner, states))]


def step(runner: Krea2Runner, states: list[DeviceState]) -> None:
    """As a server steps: on a graph where there is one."""
    runner.step(states)
    for state in states:
        state.sequence.step = 0


def _eager(runner: Krea2Runner, states: list[DeviceState]) -> None:
    forward = runner.begin_step(states)
    forward.run(range(runner.num_blocks))
    forward.finish()
    for state in states:
        state.sequence.step = 0


def _reserved(context: Context) -> int:
    return torch.cuda.memory_reserved(context.device) if context.on_gpu else 0


def _host_time(context: Context, side: int) -> None:
    """What the host does in a step of a replayed graph, and how long the device waits for it
    between two steps.
    """
    runner = context.runner
    states = images(runner, ((side, side),))
    if runner.graphs is None or why_eager(runner, states):
        return
    batch, name = ForwardBatch.of(states), name_of(side)
    pack = runner.packs.get(batch.shapes)
    times = []
    for number in range(23):
        wait(context.device)
        start = time.perf_counter()
        runner.graphs.launch(batch, pack)
        if number >= 3:
            times.append((time.perf_counter() - start) * 1e3)
    how = how_it_runs(runner, states[0].num_tokens, graph=True)
    low, high = min(times), max(times)
    context.findings.add(Row("steps", f"{name} host", median(times), "ms", low, high, how=how))

    # Steps that follow each other as a server's do, against launches that never wait for anything.
    count = 3 if context.smoke else 20
    stepped, queued = timings(
        [
            lambda: _in_flight(runner, states, count),
            lambda: [runner.graphs.launch(batch, pack) for _ in range(count)],
        ],
        context.device,
        context.seconds / 2,
    )
    gap = (stepped.median - queued.median) / count
    note = f"a step {stepped.median / count:.4g} ms, of the device {queued.median / count:.4g} ms"
    context.findings.add(
        Row("steps", f"{name} gap", gap, "ms", note=note, how=how, span=stepped.span)
    )


def _in_flight(runner: Krea2Runner, states: list[DeviceState], count: int) -> None:
    """Steps as a server runs them: what became of one is looked at while the next one runs."""
    before = None
    for _ in range(count):
        flags = runner.launch(states)
        for state in states:
            state.sequence.step = 0
        if flags.is_cuda:
            host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            host.copy_(flags, non_blocking=True)
            ended = torch.cuda.Event()
            ended.record()
            if before is not None:
                before.synchronize()
            before = ended
        else:
            flags.tolist()
