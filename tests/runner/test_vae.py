"""The 2-D decoder against the released 3-D one."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from krea2_srt.errors import CheckpointError
from krea2_srt.runner.vae import load_vae
from tests.conftest import CPU, psnr


@pytest.fixture(scope="module")
def vae(demo_model: Path):
    return load_vae(demo_model / "vae", CPU, torch.float32)


def theirs(diffusers_vae, config, latents):
    shape = (1, -1, 1, 1, 1)
    mean, std = (torch.tensor(x).view(shape) for x in (config.latents_mean, config.latents_std))
    with torch.inference_mode():
        decoded = diffusers_vae.decode((latents[:, :, None] * std + mean).to(diffusers_vae.dtype))
    return decoded.sample[:, :, 0].float() * 0.5 + 0.5


@pytest.mark.parametrize(("height", "width"), [(2, 2), (32, 32), (18, 46)])
def test_pixels_equal_diffusers(vae, diffusers_pipeline, height, width):
    latents = torch.randn(2, 16, height, width, generator=torch.Generator().manual_seed(1))
    pixels = vae.decode(latents)
    assert pixels.shape == (2, 3, 8 * height, 8 * width)
    expected = theirs(diffusers_pipeline.vae, vae.config, latents)
    assert (pixels - expected).abs().max() <= 1e-5


def test_bf16_is_close_to_float32(vae, demo_model):
    latents = torch.randn(1, 16, 32, 32, generator=torch.Generator().manual_seed(1))
    half = load_vae(demo_model / "vae", CPU, torch.bfloat16)
    assert psnr(half.decode(latents), vae.decode(latents)) >= 40


@pytest.mark.parametrize("tile", [16, 48, 64, 130, 200, 1024])
def test_tiles_have_no_seams(vae, tile):
    latents = torch.randn(1, 16, 18, 46, generator=torch.Generator().manual_seed(1))
    whole = vae.decode(latents, tile=0)
    assert (vae.decode(latents, tile=tile) - whole).abs().max() <= 1e-6


def test_a_narrower_margin_would_show(vae, monkeypatch):
    """The margin is as wide as it must be: with less, tiles differ."""
    latents = torch.randn(1, 16, 18, 46, generator=torch.Generator().manual_seed(1))
    whole = vae.decode(latents, tile=0)
    monkeypatch.setattr(vae, "_margin", vae._margin - 2)
    assert (vae.decode(latents, tile=48) - whole).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"_class_name": "AutoencoderKL"}, "_class_name"),
        ({"z_dim": 4}, "z_dim"),
        ({"dim_mult": None}, "wrong type"),
        ({"dim_mult": [1, 2]}, "dim_mult"),
        ({"base_dim": 32}, "has shape"),
    ],
)
def test_another_vae_is_refused(demo_model, tmp_path, change, named):
    folder = tmp_path / "vae"
    shutil.copytree(demo_model / "vae", folder)
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=named):
        load_vae(folder, CPU, torch.float32)
