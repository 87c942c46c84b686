"""Sequences to step, and how far results are from each other."""

import torch

from krea2_bench.gpu.context import TEXT_TOKENS
from krea2_srt.request import ImageRequest
from krea2_srt.runner.device_state import DeviceState
from krea2_srt.runner.model_runner import Krea2Runner


def name_of(width: int, count: int = 1, height: int | None = None) -> str:
    """As rows call a size."""
    size = f"{width}x{height or width}"
    return size if count == 1 else f"{count} of {size}"


def images(
    runner: Krea2Runner, sides: tuple[tuple[int, int], ...], text: int = TEXT_TOKENS
) -> list[DeviceState]:
    """Sequences before their first step, of these widths and heights."""
    hidden = runner.dit.config.hidden_size
    generator = torch.Generator(runner.device).manual_seed(7)
    found = []
    for seed, (width, height) in enumerate(sides):
        context = torch.randn(
            text, hidden, generator=generator, device=runner.device, dtype=runner.dit.dtype
        )
        image = ImageRequest("", width, height, runner.sampling.default_steps, seed=seed)
        found.append(runner.start(image, [context]))
    return found


def stepped(runner: Krea2Runner, states: list[DeviceState]) -> list[torch.Tensor]:
    """Their tokens after one step; the sequences stay as they were."""
    before = [state.tokens for state in states]
    runner.step(states)
    after = [state.tokens for state in states]
    for state, tokens in zip(states, before, strict=True):
        state.tokens = tokens
        state.sequence.step -= 1
    return after


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """|got - expected| / |expected|."""
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / expected.norm()).item()
