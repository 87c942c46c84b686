"""The 2-D decoder against the released 3-D one."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from krea2_srt.engine.cost import FLOPS_PER_PIXEL
from krea2_srt.errors import CheckpointError
from krea2_srt.model import vae as module
from krea2_srt.model.latents import unpatchify
from krea2_srt.model.pixels import quantize
from krea2_srt.model.vae import VAEDecoder
from krea2_srt.model.vae_config import VAEConfig
from krea2_srt.model.vae_files import load_vae
from tests.comparisons import CPU, psnr, relative_error


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


LARGE = [(1024, 336), (2048, 1024), (2048, 1536)]
"""Sizes at which other decoders have shown bands: wide, large, and above 2.9 megapixels."""


def pieces(vae, height: int, width: int, tile: int) -> tuple[int, int]:
    """In how many tiles a picture is decoded, and in how many slices its pixels attend."""
    tiles = len(module._tiles(height, tile, vae.margin)) * len(
        module._tiles(width, tile, vae.margin)
    )
    latents = height * width // 64
    return tiles, -(-latents // max(1, module.scores_per_slice(CPU) // latents))


def farthest_from_diffusers(vae, diffusers_vae, height: int, width: int) -> float:
    """How far a pixel is from that of Diffusers, which decodes all at once."""
    assert not diffusers_vae.use_tiling
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, height // 8, width // 8, generator=generator)
    expected = theirs(diffusers_vae, vae.config, latents)
    return (vae.decode(latents) - expected).abs().max().item()


@pytest.mark.parametrize(("width", "height"), LARGE)
def test_a_large_picture_has_no_bands(vae, diffusers_pipeline, monkeypatch, width, height):
    """At an eighth of each side, and with all that cuts a picture as much smaller."""
    tile, scores = module.default_tile(CPU), module.scores_per_slice(CPU)
    tiles, slices = pieces(vae, height, width, tile)
    monkeypatch.setattr(module, "default_tile", lambda device: tile // 8)
    monkeypatch.setattr(module, "scores_per_slice", lambda device: scores // 8**4)
    # In whole latents, of which 336 pixels would be 5.25.
    height, width = -(-height // 64) * 8, width // 8
    found = pieces(vae, height, width, tile // 8)
    assert found[0] == tiles > 1
    assert found[1] >= slices
    assert farthest_from_diffusers(vae, diffusers_pipeline.vae, height, width) <= 1e-5


# The middle one would show nothing that the largest does not.
@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [LARGE[0], LARGE[-1]])
def test_a_picture_as_large_as_it_is_has_no_bands(vae, diffusers_pipeline, width, height):
    tiles, _ = pieces(vae, height, width, module.default_tile(CPU))
    assert tiles > 1
    assert farthest_from_diffusers(vae, diffusers_pipeline.vae, height, width) <= 1e-5


@pytest.mark.parametrize("tile", [16, 48, 64, 130, 200, 1024])
def test_tiles_have_no_seams(vae, tile):
    latents = torch.randn(1, 16, 18, 46, generator=torch.Generator().manual_seed(1))
    whole = vae.decode(latents, tile=0)
    assert (vae.decode(latents, tile=tile) - whole).abs().max() <= 1e-6


def test_a_narrower_margin_would_show(vae, monkeypatch):
    """The margin is as wide as it must be: with less, tiles differ."""
    latents = torch.randn(1, 16, 18, 46, generator=torch.Generator().manual_seed(1))
    whole = vae.decode(latents, tile=0)
    monkeypatch.setattr(vae, "margin", vae.margin - 2)
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
    multiply = torch.mm

    def mm(a, b, out_dtype=None):
        return multiply(a, b) if out_dtype is None else multiply(a.to(out_dtype), b.to(out_dtype))

    monkeypatch.setattr(torch, "mm", mm)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 20, 48, generator=generator).bfloat16() for _ in range(3))

    class OnCuda(torch.Tensor):
        is_cuda = True

    pieces = list(module._attend(q.as_subclass(OnCuda), k, v, 7))
    assert [piece.shape[2] for piece in pieces] == [7, 7, 6]
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    got = torch.Tensor(torch.cat(pieces, dim=2).float())
    assert relative_error(got, expected) <= 1e-2


_KERNELS = {"aten.convolution": 2, "aten.conv2d": 2, "aten.isfinite": 3}
_NOTHING = {"aten.empty", "aten.empty_like", "aten.new_empty"}


class Launches(TorchDispatchMode):
    """Counts what a GPU is told to do; a view is nothing.

    Attributes:
        number: so far. A convolution with a bias is two: cuDNN's, and the addition.
    """

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            name = str(func.overloadpacket)
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            view = not func._schema.is_mutable and any(same_memory(out, x) for x in given)
            if not view and name not in _NOTHING:
                self.number += _KERNELS.get(name, 1)
        return out


def same_memory(a, b):
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


@pytest.fixture
def released_vae_on_a_gpu(monkeypatch):
    """A VAE of the released width, in fake tensors: decodes and quantises under a dispatch mode."""

    def decode(memory_gib, side, mode):
        properties = SimpleNamespace(total_memory=int(memory_gib * 2**30))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        # The kernel: one launch.
        monkeypatch.setattr(module, "channel_norm_triton", lambda x, gamma, silu: x.neg())
        with FakeTensorMode():
            with torch.device("cuda"):
                decoder = VAEDecoder(released_config(), torch.bfloat16).eval()
                tokens = torch.empty((side // 16) ** 2, 64)
            decoder.use_kernels()
            with torch.inference_mode(), mode:
                *_, pixels = decoder.decode_slices(unpatchify(tokens, side // 16, side // 16))
                quantize(pixels), torch.isfinite(pixels).all()
        assert pixels.shape == (3, side, side)

    return decode


def released_config():
    zeros, ones = (0.0,) * 16, (1.0,) * 16
    return VAEConfig(96, 16, (1, 2, 4, 4), 2, (False, True, True), zeros, ones)


def test_a_large_decode_is_few_launches(released_vae_on_a_gpu):
    """On the GPUs that it is meant for: each launch is host time beside the steps."""
    launches, on_a_smaller_gpu = Launches(), Launches()
    released_vae_on_a_gpu(79.1, 2048, launches)
    assert 200 < launches.number <= 300
    released_vae_on_a_gpu(23.5, 2048, on_a_smaller_gpu)
    assert launches.number < on_a_smaller_gpu.number < 600


@pytest.mark.parametrize(
    ("memory_gib", "scores"), [(139.8, 2**28), (79.1, 2**28), (47.4, 2**27), (23.5, 2**26)]
)
def test_scores_of_the_attention_take_a_small_share_of_the_memory(monkeypatch, memory_gib, scores):
    properties = SimpleNamespace(total_memory=int(memory_gib * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = module.scores_per_slice(torch.device("cuda"))
    assert found == scores
    assert found * module.BYTES_PER_SCORE <= properties.total_memory / 32


def test_the_prior_counts_what_a_decode_computes(released_vae_on_a_gpu):
    flops = FlopCounterMode(display=False)
    released_vae_on_a_gpu(79.1, 1024, flops)
    assert pytest.approx(flops.get_total_flops() / 1024**2, rel=0.02) == FLOPS_PER_PIXEL


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
