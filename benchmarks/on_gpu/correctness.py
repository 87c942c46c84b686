"""Before any time is measured: are the results right on this device?"""

import torch

from benchmarks.on_gpu.context import TEXT_TOKENS, Context
from benchmarks.on_gpu.kernel_cases import exact_cases
from benchmarks.on_gpu.rows import Row
from krea2_srt.runner.graphs import StepGraphs
from krea2_srt.runner.lanes import Lanes
from krea2_srt.runner.memory_plan import MAX_GRAPH_TOKENS
from krea2_srt.runner.model_runner import DenoisingSequence, Krea2Runner

SIDES = ((256, 256), (512, 320), (256, 256), (64, 128))


class WrongResult(Exception):
    """A figure is off, so no time means anything."""


def run(context: Context) -> None:
    """Kernels against float64, packed against alone, graphs against eager."""
    for name, error, tolerance in exact_cases(context):
        _check(context, f"{name} vs float64", error, tolerance)
    sequences = images(context.runner, SIDES if not context.smoke else ((32, 32), (64, 32)))
    packed = stepped(context.runner, sequences)
    worst = 0.0
    for sequence, expected in zip(sequences, packed, strict=True):
        (alone,) = stepped(context.runner, [sequence])
        worst = max(worst, relative(alone, expected))
    _check(context, "packed vs alone", worst, 2e-2 if context.device.type == "cuda" else 1e-5)
    if (capture := context.capture) is None or context.attention.graph is None:
        return
    found = []
    for how in (capture, lambda function: function):
        graphs = StepGraphs(
            context.runner.dit, context.attention.graph.attend, how, MAX_GRAPH_TOKENS
        )
        lanes = Lanes.of(sequences)
        pack = context.runner.packs.get(lanes.shapes)
        graphs.prepare(lanes, pack)
        step = graphs.launch(lanes, pack)
        found.append(None if step is None else step[0].clone())
        del graphs
    if found[0] is None or found[1] is None:
        raise WrongResult("a graph could not be captured")
    _check(context, "graph vs eager", float((found[0] != found[1]).sum()), 0.0, "elements")


def images(
    runner: Krea2Runner, sides: "tuple[tuple[int, int], ...]", text: int = TEXT_TOKENS
) -> list[DenoisingSequence]:
    """Sequences before their first step, of these widths and heights."""
    hidden = runner.dit.config.hidden_size
    generator = torch.Generator(runner.device).manual_seed(7)
    found = []
    for seed, (width, height) in enumerate(sides):
        context = torch.randn(
            text, hidden, generator=generator, device=runner.device, dtype=runner.dit.dtype
        )
        schedule = runner.schedule(runner.recipe.default_steps, width, height)
        found.append(runner.start(context, width, height, seed, schedule))
    return found


def stepped(runner: Krea2Runner, sequences: list[DenoisingSequence]) -> list[torch.Tensor]:
    """Their tokens after one step; the sequences stay as they were."""
    before = [sequence.tokens for sequence in sequences]
    runner.step(sequences)
    after = [sequence.tokens for sequence in sequences]
    for sequence, tokens in zip(sequences, before, strict=True):
        sequence.tokens, sequence.step = tokens, sequence.step - 1
    return after


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """|got - expected| / |expected|."""
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / expected.norm()).item()


def _check(
    context: Context, what: str, error: float, tolerance: float, unit: str = "relative error"
) -> None:
    note = f"at most {tolerance:g}"
    context.findings.rows.append(Row("correctness", what, error, unit, note=note))
    if not error <= tolerance:
        raise WrongResult(f"{what}: {error:.3g} {unit}, {note}")
