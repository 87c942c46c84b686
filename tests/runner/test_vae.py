"""The 2-D decoder against the released 3-D one."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from krea2_srt.errors import CheckpointError
from krea2_srt.runner.vae import load_vae
from tests.conftest import CPU, psnr, relative_error


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


def test_pixels_on_the_kernels_are_those_on_torch(vae, demo_model, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    latents = torch.randn(1, 16, 6, 4, generator=torch.Generator().manual_seed(1))
    fused = load_vae(demo_model / "vae", CPU, torch.float32)
    fused.use_kernels()
    assert (fused.decode(latents) - vae.decode(latents)).abs().max() <= 1e-5
    fused.use_kernels(False)
    assert torch.equal(fused.decode(latents), vae.decode(latents))


def test_the_attention_of_a_gpu_is_that_of_the_cpu(monkeypatch):
    """torch multiplies bf16 into float32 on CUDA only; a stand-in does so here."""
    from krea2_srt.runner import vae as module

    multiply = torch.mm

    def mm(a, b, out_dtype=None):
        return multiply(a, b) if out_dtype is None else multiply(a.to(out_dtype), b.to(out_dtype))

    monkeypatch.setattr(torch, "mm", mm)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 48, generator=generator).bfloat16() for n in (7, 20, 20))

    class OnCuda(torch.Tensor):
        is_cuda = True

    got = module._attend(q.as_subclass(OnCuda), k, v)
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert got.shape == expected.shape
    assert relative_error(torch.Tensor(got.float()), expected) <= 1e-2


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
