"""`krea2_srt.Krea2`: the model without a server."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import krea2_srt
from krea2_srt import Krea2
from krea2_srt.errors import (
    CheckpointError,
    ConfigError,
    Krea2Error,
    OutOfMemoryError,
    RequestError,
)
from krea2_srt.request import ImageRequest
from tests.comparisons import psnr

SMALL = {"width": 64, "height": 48, "steps": 3}


@pytest.fixture(scope="module")
def model(demo_model):
    return Krea2.load(demo_model, device="cpu", dtype="float32")


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return psnr(*(torch.from_numpy(pixels / 255) for pixels in (a, b))) >= 60


def test_it_generates_what_diffusers_does(model, diffusers_pipeline):
    (found,) = model.generate("a red fox", seed=5, guidance=2.0, negative_prompt="blue", **SMALL)
    expected = diffusers_pipeline(
        "a red fox",
        negative_prompt="blue",
        guidance_scale=2.0,
        width=64,
        height=48,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    assert close(np.asarray(found), np.asarray(expected))


def test_images_have_seeds_of_their_own_and_defaults_are_the_checkpoints(model):
    first, second = model.generate("x", seed=3, num_images=2, **SMALL)
    (again,) = model.generate("x", seed=4, **SMALL)
    assert np.array_equal(np.asarray(second), np.asarray(again))
    assert not np.array_equal(np.asarray(first), np.asarray(second))
    side = model.sampling.default_side
    assert model.generate("x", steps=1)[0].size == (side, side)


def test_a_pack_changes_no_image(model):
    requests = [
        ImageRequest("a", 64, 48, 3, seed=1),
        ImageRequest("b", 32, 64, 2, guidance=2.0, seed=2, num_images=2),
    ]
    steps = []
    alone = list(model.images(requests, on_step=lambda: steps.append(1)))
    assert len(steps) == 3 + 2 * 2
    for pixels, expected in zip(model.images(requests, pack=3), alone, strict=True):
        assert close(pixels, expected)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"width": 50}, "width"),
        ({"steps": 0}, "steps"),
        ({"num_images": 0}, "num_images"),
        ({"guidance": float("nan")}, "guidance"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_wrong_argument_is_named(model, arguments, field):
    with pytest.raises(RequestError, match=field):
        model.generate("x", **{**SMALL, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"dtype": "int3"}, ConfigError),
        ({"device": "abacus"}, RequestError),
        ({"device": "cuda:99"}, RequestError),
        ({"model": "no/such/folder/here"}, CheckpointError),
    ],
)
def test_what_cannot_be_loaded_says_why(demo_model, arguments, error, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = {"model": demo_model, "device": "cpu", **arguments}
    with pytest.raises(error) as raised:
        Krea2.load(**arguments)
    assert isinstance(raised.value, Krea2Error)


def test_the_package_itself_needs_no_torch():
    code = "import sys, krea2_srt; print(krea2_srt.__version__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [krea2_srt.__version__, "False"]
    with pytest.raises(AttributeError, match="no attribute 'Krea3'"):
        krea2_srt.Krea3  # noqa: B018


@pytest.mark.slow
def test_the_example(demo_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    load = Krea2.load  # bfloat16 takes minutes on CPUs without its instructions
    monkeypatch.setattr(Krea2, "load", lambda name: load(name, dtype="float32"))
    example = Path(__file__).parents[2] / "examples" / "offline.py"
    monkeypatch.setattr(sys, "argv", [str(example), str(demo_model), "a red fox"])
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.split() == ["image_0.png", "image_1.png"]
    for number in range(2):
        Image.open(tmp_path / f"image_{number}.png").load()


@pytest.mark.parametrize("pack", [0, -1])
def test_a_pack_has_at_least_one_image(model, pack):
    with pytest.raises(RequestError, match=f"pack: must be 1 or greater, got {pack}"):
        list(model.images([ImageRequest("x", 64, 48, 1)], pack))


def test_limits_of_the_environment_hold(demo_model, monkeypatch):
    monkeypatch.setenv("KREA2_SRT_MAX_SIDE", "128")
    model = Krea2.load(demo_model, device="cpu", dtype="float32")
    with pytest.raises(RequestError, match="width: must be between 16 and 128, got 256"):
        model.generate("x", width=256, height=64, steps=1)


def test_memory_that_runs_out_is_our_error(model, monkeypatch):
    def fails(_sequences):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model.runner, "step", fails)
    with pytest.raises(OutOfMemoryError, match="out of memory"):
        model.generate("x", **SMALL)
