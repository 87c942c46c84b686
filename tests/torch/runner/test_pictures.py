"""Whole pictures: against Diffusers, and in packs against alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.request import ImageRequest
from krea2_srt.runner.device_state import DeviceState
from krea2_srt.runner.model_runner import Krea2Runner
from tests.comparisons import CPU, PROMPT, psnr, relative_error


def start(runner: Krea2Runner, prompt, width, height, steps, seed, guidance=0.0, negative=""):
    image = ImageRequest(prompt, width, height, steps, guidance, negative, seed)
    return runner.start(image, runner.encode(image.prompts))


def finish(runner: Krea2Runner, sequences: list[DeviceState]) -> list[torch.Tensor]:
    """Run all in one pack; those that are done leave it."""
    while pending := [s for s in sequences if not s.done]:
        runner.step(pending)
    return [runner.decode(s) for s in sequences]


def diffusers_picture(pipeline, prompt, width, height, steps, seed, guidance=0.0, negative=""):
    picture = pipeline(
        prompt,
        negative_prompt=negative,
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images[0]
    return torch.from_numpy(picture).permute(2, 0, 1)


TURBO = [
    (PROMPT, 256, 256, 8, 5),
    ("a blue house by the sea", 208, 320, 4, 1234567),
]
RAW = [
    (PROMPT, 256, 256, 12, 5, 3.5, ""),
    ("a blue house", 208, 320, 6, 0, 4.5, "people, cars"),
    ("no guidance", 128, 128, 6, 3, 0.0, ""),
]


# On a CPU without bfloat16 instructions Diffusers takes minutes.
BOTH_DTYPES = pytest.mark.parametrize(
    ("dtype", "least"),
    [(torch.float32, 60), pytest.param(torch.bfloat16, 40, marks=pytest.mark.slow)],
)


@BOTH_DTYPES
def test_turbo_equals_diffusers(demo_model: Path, load_diffusers: Callable, dtype, least):
    runner = Krea2Runner.load(Krea2Checkpoint.from_folder(demo_model), CPU, dtype)
    pipeline = load_diffusers(demo_model, dtype)
    for case in TURBO:
        (picture,) = finish(runner, [start(runner, *case)])
        assert psnr(picture, diffusers_picture(pipeline, *case)) >= least, case


@BOTH_DTYPES
@pytest.mark.slow
def test_raw_with_guidance_equals_diffusers(raw_demo_model, load_diffusers, dtype, least):
    runner = Krea2Runner.load(Krea2Checkpoint.from_folder(raw_demo_model), CPU, dtype)
    pipeline = load_diffusers(raw_demo_model, dtype)
    for case in RAW:
        (picture,) = finish(runner, [start(runner, *case)])
        assert psnr(picture, diffusers_picture(pipeline, *case)) >= least, case


MIXED = [  # different prompts, lengths, sizes, steps, seeds and guidance
    (PROMPT, 256, 256, 8, 5),
    ("x", 128, 320, 3, 5),
    ("a blue house " * 40, 192, 160, 5, 99, 3.5, "rain"),
    ("", 64, 64, 1, 0),
]


def test_pictures_of_a_mixed_pack_equal_each_alone(runner):
    together = finish(runner, [start(runner, *case) for case in MIXED])
    for case, picture in zip(MIXED, together, strict=True):
        (alone,) = finish(runner, [start(runner, *case)])
        assert relative_error(picture, alone) <= 1e-5, case


@pytest.mark.slow
def test_a_mixed_pack_in_bf16(demo_model):
    runner = Krea2Runner.load(Krea2Checkpoint.from_folder(demo_model), CPU, torch.bfloat16)
    together = finish(runner, [start(runner, *case) for case in MIXED])
    for case, picture in zip(MIXED, together, strict=True):
        (alone,) = finish(runner, [start(runner, *case)])
        assert psnr(picture, alone) >= 40, case


def test_sequences_at_different_steps_share_a_pack(runner):
    late, early = start(runner, *MIXED[0]), start(runner, *MIXED[1])
    for _ in range(5):
        runner.step([late])
    pictures = finish(runner, [late, early])
    for case, picture in zip(MIXED[:2], pictures, strict=True):
        (alone,) = finish(runner, [start(runner, *case)])
        assert relative_error(picture, alone) <= 1e-5


def test_images_of_one_request_differ_and_follow_their_seeds(runner):
    """n images have seeds seed, seed + 1, ... whatever their place in the pack."""
    first = finish(runner, [start(runner, PROMPT, 128, 128, 4, seed) for seed in (7, 8)])
    second = finish(runner, [start(runner, PROMPT, 128, 128, 4, seed) for seed in (8, 9)])
    assert relative_error(first[1], second[0]) <= 1e-5
    assert psnr(first[0], first[1]) < 30


def test_guidance_needs_a_negative_prompt(runner):
    contexts = runner.encode(["x"])
    with pytest.raises(ValueError, match="contexts: of 2 prompts with guidance 2, got 1"):
        runner.start(ImageRequest("x", 64, 64, 2, guidance=2.0), contexts)


def test_a_negative_prompt_that_is_the_prompt_changes_nothing(runner):
    """One context for both branches: they must not be taken for one another."""
    plain, guided = (start(runner, "x", 64, 48, 2, 1, guidance, "x") for guidance in (0.0, 3.5))
    expected, picture = (finish(runner, [sequence])[0] for sequence in (plain, guided))
    assert relative_error(picture, expected) <= 1e-5
