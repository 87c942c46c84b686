"""The trained demo checkpoint: what krea2-demo-model writes unless told otherwise."""

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from krea2_srt.cli.demo_model import main
from krea2_srt.demo.trained_weights import RECIPE, WEIGHTS
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.runner.model_runner import Krea2Runner
from tests.comparisons import CPU
from tests.conftest import clone_checkpoint
from tests.torch.cli.test_demo_model import digest
from tests.torch.runner.test_pictures import finish, start
from tools.demo_model.__main__ import DECODER_DB
from tools.demo_model.autoencoder import scenes
from tools.demo_model.judge import Verdict, judge
from tools.demo_model.wish import Asked, Wish

RIGHT = Verdict(colour=True, shape=True, background=True)
HEART = Wish(("yellow",), (Asked("heart", "red"),))
PROMPT = "a red heart on a yellow background"


def bytes_of(picture: torch.Tensor) -> np.ndarray:
    return (picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


@pytest.mark.slow
def test_it_is_what_the_command_writes_and_small(trained_model, tmp_path):
    main([str(tmp_path / "model")])
    assert digest(tmp_path / "model") == digest(trained_model)
    files = [file for file in trained_model.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 60e6


def test_the_package_says_which_recipe_made_it():
    assert WEIGHTS.stat().st_size < 15e6
    about = json.loads(WEIGHTS.with_suffix(".json").read_text())
    assert about["recipe"] == RECIPE
    assert about["vae_db"] >= DECODER_DB
    for told in ("seen", "held_out"):
        assert about[told].keys() == {"colour", "shape", "background"}


@pytest.mark.slow
def test_the_vae_generates_scenes_again(trained_model):
    """Through Diffusers, as a stranger would: 28 dB, and latents as its config says."""
    from diffusers import AutoencoderKLQwenImage

    vae = AutoencoderKLQwenImage.from_pretrained(trained_model / "vae")
    pixels = scenes(Random(77), 128, 128, 32)
    with torch.no_grad():
        latents = vae.encode(pixels[:, :, None]).latent_dist.mode()
        back = vae.decode(latents, return_dict=False)[0][:, :, 0].clamp(-1, 1)
    errors = ((back - pixels) / 2).square().mean(dim=(1, 2, 3))
    assert (-10 * errors.log10()).mean() >= 28
    shape = (1, 16, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape)
    std = torch.tensor(vae.config.latents_std).view(shape)
    normed = ((latents - mean) / std).transpose(0, 1).flatten(1)
    torch.testing.assert_close(normed.mean(1), torch.zeros(16), rtol=0, atol=0.25)
    torch.testing.assert_close(normed.std(1), torch.ones(16), rtol=0, atol=0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turbo_generates_it_in_eight_steps_without_guidance(trained_model, dtype):
    runner = Krea2Runner.load(Krea2Checkpoint.from_folder(trained_model), CPU, dtype)
    (picture,) = finish(runner, [start(runner, PROMPT, 256, 256, 8, 0)])
    assert judge(bytes_of(picture), HEART) == RIGHT


@pytest.mark.parametrize("guidance", [0.0, 2.5])
@pytest.mark.slow
def test_raw_generates_it_in_more_steps_with_guidance_or_without(
    trained_model: Path, tmp_path: Path, guidance: float
):
    clone_checkpoint(trained_model, tmp_path / "raw", is_distilled=False)
    runner = Krea2Runner.load(Krea2Checkpoint.from_folder(tmp_path / "raw"), CPU, torch.float32)
    (picture,) = finish(runner, [start(runner, PROMPT, 256, 256, 20, 0, guidance)])
    assert judge(bytes_of(picture), HEART) == RIGHT
