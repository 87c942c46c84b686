"""The demo model on the kernels, in Triton's interpreter, against itself on torch."""

from dataclasses import replace

import pytest
import torch

from krea2_srt.kernels.operations import TRITON
from krea2_srt.model.dit_files import load_dit
from krea2_srt.request import ImageRequest
from krea2_srt.runner.model_runner import Krea2Runner
from tests.comparisons import CPU, relative_error

FUSED = replace(TRITON, fused_mlp_tokens=0)

# (text, width, height, seed, guidance)
IMAGES = [("a cat", 64, 32, 1, 0.0), ("a dog in the rain", 32, 32, 2, 3.5), ("", 16, 16, 3, 0.0)]


def stepped(runner: Krea2Runner, steps: int) -> list[torch.Tensor]:
    sequences = []
    for number, (prompt, width, height, seed, guidance) in enumerate(IMAGES):
        image = ImageRequest(prompt, width, height, 3 + number, guidance, "blurry", seed)
        sequences.append(runner.start(image, runner.encode(image.prompts)))
    for _ in range(steps):
        runner.step(sequences)
    return [s.tokens for s in sequences]


@pytest.mark.parametrize(
    ("operations", "steps"),
    [
        pytest.param(TRITON, 2, id="apart", marks=pytest.mark.slow),
        pytest.param(FUSED, 1, id="fused"),
    ],
)
def test_steps_on_the_kernels_are_the_steps_on_torch(runner, demo_model, operations, steps):
    dit = load_dit(demo_model / "transformer", CPU, torch.float32)
    dit.operations = operations
    on_kernels = Krea2Runner(
        dit, runner.text_encoder, runner.vae, runner.sampling, runner.attention
    )
    for got, expected in zip(stepped(on_kernels, steps), stepped(runner, steps), strict=True):
        assert relative_error(got, expected) <= 1e-5
