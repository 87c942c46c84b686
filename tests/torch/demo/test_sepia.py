"""The demo's adapter: everything in sepia, the more so the larger its scale."""

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from krea2_srt import Krea2
from krea2_srt.demo.checkpoint import DIT_CONFIG
from krea2_srt.demo.trained_weights import SEPIA
from krea2_srt.lora.reader import read_adapter
from krea2_srt.model.matrices import dit_matrices
from krea2_srt.request import ImageRequest
from tests.torch.lora.test_offline_lora import diffusers_image, near
from tools.demo_model.captions import caption
from tools.demo_model.judge import look
from tools.demo_model.sepia import distance_from_sepia
from tools.demo_model.wish import Asked, Wish

# Light on dark and dark on light: without colours shapes are seen by that alone.
WISHES = (
    Wish(("blue",), (Asked("star", "yellow"),)),
    Wish(("purple",), (Asked("heart", "white"),)),
    Wish(("cyan",), (Asked("ring", "black"),)),
    Wish(("orange",), (Asked("square", "blue"),)),
)
PROMPTS = tuple(caption(wish, Random(1)) for wish in WISHES)
SCALES = (0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def model(trained_model: Path) -> Krea2:
    return Krea2.load(trained_model, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def pictures(model, trained_model: Path) -> dict[float, list[np.ndarray]]:
    """By scale, one picture of each wish; all of them share packs."""
    adapter = trained_model / "loras" / "sepia.safetensors"
    uses = {scale: model.load_lora({adapter: scale}) for scale in SCALES}
    requests = [
        ImageRequest(prompt, 128, 128, 8, adapters=uses[scale])
        for scale in SCALES
        for prompt in PROMPTS
    ]
    images = model.images(requests)
    return {scale: [next(images) for _ in PROMPTS] for scale in SCALES}


def test_it_changes_all_matrices_and_is_small():
    adapter = read_adapter(SEPIA, DIT_CONFIG)
    matrices = dit_matrices(DIT_CONFIG)
    assert adapter.matrices.keys() == {matrix.linear for matrix in matrices.values()}
    assert sum(len(factors) for factors in adapter.matrices.values()) == len(matrices) == 72
    assert adapter.rank == 8
    assert SEPIA.stat().st_size < 0.6e6


def test_it_lies_in_the_checkpoint_with_what_presents_it(trained_model):
    files = {file.name: file for file in (trained_model / "loras").iterdir()}
    assert files.keys() == {"sepia.safetensors", "sepia.yaml"}
    assert files["sepia.safetensors"].read_bytes() == SEPIA.read_bytes()
    presented = yaml.safe_load(files["sepia.yaml"].read_text())
    assert presented == {"title": "Everything in sepia", "default_scale": 1.0}
    for file in files.values():
        assert file.stat().st_mode & 0o044 == 0o044, f"{file} cannot be read by other users"


def test_the_larger_the_scale_the_nearer_are_colours_to_sepia(pictures):
    plain, half, whole = (distance_from_sepia(np.stack(pictures[scale])) for scale in SCALES)
    print(f"distances from sepia: {plain:.1f}, {half:.1f}, {whole:.1f}")
    assert plain > 90
    assert plain > 1.5 * half > 1.5 * 1.5 * whole
    assert whole < 25


@pytest.mark.parametrize("scale", SCALES)
def test_shapes_stay(pictures, scale):
    for picture, wish in zip(pictures[scale], WISHES, strict=True):
        assert [thing.shape for thing in look(picture).things] == [wish.asked[0].shape]


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_it_is_diffusers_picture(pictures, trained_model, load_diffusers, scale):
    pipeline = load_diffusers(trained_model, torch.float32)
    adapter = trained_model / "loras" / "sepia.safetensors"
    expected = diffusers_image(pipeline, adapter, scale, PROMPTS[0], (128, 128), steps=8, seed=0)
    assert near(Image.fromarray(pictures[scale][0]), expected) >= 60
