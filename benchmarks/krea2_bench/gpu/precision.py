"""How far 8 bits are from bf16 on this device: of the velocity in every step, and of the picture.

The weights are random, so this says nothing of the released model's pictures; a broken kernel would
show.
"""

import torch
from torch import Tensor

from krea2_bench.gpu.context import Context
from krea2_bench.gpu.rows import Row
from krea2_bench.gpu.sequences import images, relative
from krea2_srt.model.quantization import SERVED
from krea2_srt.runner.model_runner import Krea2Runner

SIDE = 512


def run(context: Context) -> None:
    """Every quantisation that a server offers."""
    side = 32 if context.smoke else SIDE
    theirs, reference = _generate(context.whole(context.runner), side)
    for format in SERVED:
        runner = context.whole(context.quantized_runner(format))
        errors = [_velocity_error(runner, side, step, theirs) for step in (0, len(theirs) - 1)]
        _, picture = _generate(runner, side)
        psnr = -10 * torch.log10((picture - reference).double().square().mean()).item()
        for what, error in zip(("first", "last"), errors, strict=True):
            context.findings.add(
                Row(
                    "precision",
                    f"{format} velocity {side}x{side}, {what} step",
                    error,
                    "relative error",
                )
            )
        context.findings.add(
            Row(
                "precision",
                f"{format} picture {side}x{side}, PSNR to bf16",
                psnr,
                "dB",
                better="more",
            )
        )


def _generate(runner: Krea2Runner, side: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """(tokens before, velocity) of every step, and the pixels."""
    (state,) = images(runner, ((side, side),))
    state.sequence.wants_previews = True  # keeps its velocities
    found = []
    while not state.done:
        before = state.tokens
        runner.step([state])
        assert state.velocity is not None
        found.append((before, state.velocity))
    return found, runner.decode(state)


def _velocity_error(
    runner: Krea2Runner, side: int, step: int, theirs: list[tuple[Tensor, Tensor]]
) -> float:
    (state,) = images(runner, ((side, side),))
    state.sequence.wants_previews = True  # keeps its velocities
    state.tokens, state.sequence.step = theirs[step][0], step
    runner.step([state])
    assert state.velocity is not None
    return relative(state.velocity, theirs[step][1])
