"""One step, at all sizes and in packs: ours eager, on graphs and in fp8, against plain PyTorch."""

import time
from collections.abc import Callable
from statistics import median

import torch

from benchmarks.on_gpu.context import Context
from benchmarks.on_gpu.correctness import images
from benchmarks.on_gpu.plain_dit import PlainDiT
from benchmarks.on_gpu.rows import Row, timed
from benchmarks.on_gpu.timing import timings
from krea2_srt.runner.lanes import Lanes
from krea2_srt.runner.memory_plan import MAX_GRAPH_TOKENS
from krea2_srt.runner.model_runner import DenoisingSequence, Krea2Runner

SIDES = (256, 512, 768, 1024, 1536, 2048)
COMPILED_SIDES = (256, 512, 1024)
PACKS = ((256, 8), (512, 4), (256, 13), (256, 25), (256, 51), (1024, 4))
"""Side and number of images; the last ones fill packs of 4k, 8k and 16k tokens."""

COMPILE_S = 120.0
"""After which no further size is compiled."""


def name_of(side: int, count: int = 1) -> str:
    """As rows call it."""
    return f"{side}x{side}" if count == 1 else f"{count} of {side}x{side}"


def run(context: Context) -> None:
    """Interleaved, so that a GPU that gets warmer slows all alike."""
    plain = PlainDiT(context.dit)
    compiled, compile_end = PlainDiT(context.dit), time.perf_counter() + COMPILE_S
    for block in compiled.blocks:
        # One block is compiled for all of them, as Diffusers advises.
        block.compile(dynamic=False)
    use_graphs(context)
    sides = (32, 48) if context.smoke else SIDES
    for side in sides:
        (sequence,) = images(context.runner, ((side, side),))
        works = _ours(context, [sequence])
        works["plain"] = lambda s=sequence: _plain(context, plain, s)
        on_gpu = context.device.type == "cuda"
        if on_gpu and side in COMPILED_SIDES and time.perf_counter() < compile_end:
            with context.findings.attempt(f"steps: torch.compile at {name_of(side)}"):
                _plain(context, compiled, sequence)
                works["compiled"] = lambda s=sequence: _plain(context, compiled, s)
        with context.findings.attempt(f"steps: {name_of(side)}"):
            _time(context, works, name_of(side), [sequence])
    for side, count in ((32, 3),) if context.smoke else PACKS:
        sequences = images(context.runner, ((side, side),) * count)
        with context.findings.attempt(f"steps: {name_of(side, count)}"):
            _time(context, _ours(context, sequences), name_of(side, count), sequences)
    for side in sides[:2]:
        _host_time(context, side)


def use_graphs(context: Context) -> None:
    """Let both runners replay, where there are graphs."""
    if context.capture is None or context.attention.graph is None:
        return
    for runner in (context.runner, context.fp8_runner):
        if runner.graphs is None:
            tokens = min(MAX_GRAPH_TOKENS, context.attention.max_graph_tokens)
            runner.use_graphs(context.capture, int(tokens))
            runner.use_text_graphs(context.capture)


def _ours(context: Context, sequences: list[DenoisingSequence]) -> dict[str, Callable[[], object]]:
    runner = context.runner
    works: dict[str, Callable[[], object]] = {"eager": lambda: _eager(runner, sequences)}
    if runner.graphs is not None:
        works["graph"] = lambda: _step(runner, sequences)
        works["fp8"] = lambda: _step(context.fp8_runner, sequences)
    elif context.smoke:
        works["fp8"] = lambda: _eager(context.fp8_runner, sequences)
    return works


@torch.inference_mode()
def _eager(runner: Krea2Runner, sequences: list[DenoisingSequence]) -> None:
    forward = runner.begin_step(sequences)
    forward.run(range(runner.num_blocks))
    forward.finish()
    for sequence in sequences:
        sequence.step = 0


def _step(runner: Krea2Runner, sequences: list[DenoisingSequence]) -> None:
    runner.step(sequences)
    for sequence in sequences:
        sequence.step = 0


def _plain(context: Context, plain: PlainDiT, sequence: DenoisingSequence) -> None:
    rope = context.runner.packs.get(Lanes.of([sequence]).shapes).rope
    sigmas = sequence.schedule.sigmas
    velocity = plain(sequence.tokens, sequence.context, sigmas[0], rope)
    stepped = sequence.tokens + (sigmas[1] - sigmas[0]) * velocity.float()
    torch.isfinite(stepped).all().item()


def _time(
    context: Context,
    works: dict[str, Callable[[], object]],
    name: str,
    sequences: list[DenoisingSequence],
) -> None:
    lanes = [sequence.num_tokens for sequence in sequences]
    found = timings(list(works.values()), context.device, context.seconds)
    for how, timing in zip(works, found, strict=True):
        floor = context.step_floor_ms(lanes, fp8=how == "fp8")
        context.findings.rows.append(
            timed("steps", f"{name} {how}", timing, floor, f"{sum(lanes)} tokens")
        )
    for sequence in sequences:
        sequence.step = 0


def _host_time(context: Context, side: int) -> None:
    """What the host does in a step of a replayed graph, while the device waits for nothing."""
    graphs = context.runner.graphs
    if graphs is None:
        return
    sequences = images(context.runner, ((side, side),))
    lanes = Lanes.of(sequences)
    times = []
    for number in range(23):
        torch.cuda.synchronize(context.device)
        start = time.perf_counter()
        with torch.inference_mode():
            graphs.launch(lanes, context.runner.packs.get(lanes.shapes))
        if number >= 3:
            times.append((time.perf_counter() - start) * 1e3)
    context.findings.rows.append(
        Row("steps", f"{name_of(side)} host", median(times), "ms", min(times), max(times))
    )
