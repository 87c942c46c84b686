"""The demo model on the kernels, in Triton's interpreter, against itself on torch."""

import pytest
import torch

from krea2_srt.kernels.operations import TRITON
from krea2_srt.model.checkpoint import load_dit
from krea2_srt.runner.model_runner import Krea2Runner
from tests.conftest import CPU, relative_error

# (text, width, height, seed, guidance)
IMAGES = [("a cat", 64, 32, 1, 0.0), ("a dog in the rain", 32, 32, 2, 3.5), ("", 16, 16, 3, 0.0)]


def stepped(runner: Krea2Runner) -> list[torch.Tensor]:
    sequences = []
    for number, (prompt, width, height, seed, guidance) in enumerate(IMAGES):
        context, negative = runner.encode([prompt, "blurry"])
        schedule = runner.schedule(3 + number, width, height)
        sequences.append(runner.start(context, width, height, seed, schedule, guidance, negative))
    for _ in range(2):
        runner.step(sequences)
    return [s.tokens for s in sequences]


@pytest.fixture
def on_kernels(runner, demo_model, monkeypatch):
    dit = load_dit(demo_model / "transformer", CPU, torch.float32)
    dit.operations = TRITON
    return Krea2Runner(dit, runner.text_encoder, runner.vae, runner.recipe, runner.attention)


def test_steps_on_the_kernels_are_the_steps_on_torch(runner, on_kernels):
    for got, expected in zip(stepped(on_kernels), stepped(runner), strict=True):
        assert relative_error(got, expected) <= 1e-5
