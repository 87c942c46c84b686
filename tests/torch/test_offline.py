"""`krea2_srt.Krea2`: the model without a server."""

import re
import runpy
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import krea2_srt
from krea2_srt import Krea2
from krea2_srt.engine.cost import roofline
from krea2_srt.engine.engine import Engine
from krea2_srt.errors import (
    CheckpointError,
    ConfigError,
    Krea2Error,
    OutOfMemoryError,
    RequestError,
)
from krea2_srt.messages import preview_steps
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.offline import GenerationCancelled, ImageProgress
from krea2_srt.request import ImageRequest
from krea2_srt.runner.executor import RunnerExecutor
from tests.comparisons import psnr, relative_error

SMALL = {"size": (64, 48), "steps": 3}


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


def test_a_single_file_is_a_model_with_its_parts_beside(model, original_file, demo_model):
    parts = {"text_encoder": demo_model, "vae": demo_model / "vae", "recipe": "raw"}
    raw = Krea2.load(original_file, **parts, device="cpu", dtype="float32")
    assert raw.sampling.default_steps == 52
    options = {**SMALL, "guidance": 0.0, "mu": 1.15}
    (found,) = raw.generate("a red fox", seed=5, **options)
    (expected,) = model.generate("a red fox", seed=5, **options)
    assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_parts_of_what_was_found_already_are_refused(model, demo_model):
    checkpoint = Krea2Checkpoint.from_folder(demo_model)
    for name, value in (("vae", "x"), ("tokenizer", "x"), ("recipe", "raw")):
        with pytest.raises(ConfigError, match=f"^{name}: has no effect"):
            Krea2.load(checkpoint, **{name: value})


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
    alone = list(model.images(requests, pack=1))
    for pixels, expected in zip(model.images(requests), alone, strict=True):
        assert close(pixels, expected)


@pytest.fixture
def packs(model, monkeypatch) -> list[int]:
    """How many images each forward has had."""
    sizes, step = [], model.runner.step
    monkeypatch.setattr(model.runner, "step", lambda pack: sizes.append(len(pack)) or step(pack))
    return sizes


@pytest.fixture
def latents(model, monkeypatch) -> list[torch.Tensor]:
    """Those that are decoded, in order."""
    found, decode = [], model.runner.decode
    monkeypatch.setattr(
        model.runner, "decode", lambda s, *rest: found.append(s.tokens) or decode(s, *rest)
    )
    return found


PROMPTS = ["x", "a blue house " * 9, "", "a red fox in the snow"]


def test_many_prompts_in_one_pack_are_each_what_they_are_alone(model, packs, latents):
    options = {"seed": 3, "guidance": 1.5, "negative_prompt": "rain", **SMALL}
    together = model.generate(PROMPTS, num_images=2, **options)
    assert packs == [8] * 3
    alone = []
    for prompt in PROMPTS:
        for seed in (3, 4):
            alone += model.generate(prompt, **{**options, "seed": seed})
    assert packs[3:] == [1] * 8 * 3
    for got, expected in zip(latents[:8], latents[8:], strict=True):
        assert relative_error(got, expected) <= 1e-5
    for got, expected in zip(together, alone, strict=True):
        assert close(np.asarray(got), np.asarray(expected))


def test_packs_are_bounded_in_images_and_in_tokens(model, packs, monkeypatch):
    model.generate(PROMPTS, pack=3, size=(64, 48), steps=1)
    assert packs == [3, 1]
    packs.clear()
    small = replace(model.config, max_pack_tokens=60)
    monkeypatch.setattr(model, "config", small)
    assert len(model.generate(["x"] * 5, size=(64, 64), steps=2)) == 5
    assert packs == [2, 2, 2, 2, 1, 1]
    packs.clear()
    # A prompt of more tokens than its length lets expect: its image goes alone.
    assert len(model.generate(["\u16a0" * 20, "x"], size=(64, 64), steps=1)) == 2
    assert packs == [1, 1]


def test_the_pictures_are_the_servers(model):
    """Those of the engine that a server has, which packs and decodes in its own way."""
    executor = RunnerExecutor(model.runner)
    engine = Engine(executor, replace(roofline(), blocks=model.runner.num_blocks))
    wanted = ImageRequest("a red fox", 64, 48, 3, 2.0, "blue", seed=5, num_images=3, mu=0.7)
    request = engine.submit("a", [wanted])
    while not engine.idle:
        engine.turn()
    found = model.generate(
        "a red fox", num_images=3, guidance=2.0, negative_prompt="blue", seed=5, mu=0.7, **SMALL
    )
    for image, sequence in zip(found, request.sequences, strict=True):
        assert close(np.asarray(image), executor.take_pixels(sequence))


def test_each_step_of_each_image_is_told(model):
    told = []
    model.generate(["a", "b"], num_images=2, pack=3, on_progress=told.append, **SMALL)
    by_image = {n: [(p.step, p.total) for p in told if p.index == n] for n in range(4)}
    assert by_image == {n: [(1, 3), (2, 3), (3, 3)] for n in range(4)}
    assert all(progress.preview is None for progress in told)


def test_previews_come_on_the_way_and_are_small(model):
    told = []
    (image,) = model.generate("x", size=(512, 256), steps=5, previews=2, on_progress=told.append)
    previews = {p.step: p.preview.size for p in told if p.preview}
    assert previews == dict.fromkeys(preview_steps(5, 2), (256, 128))
    assert image.size == (512, 256)
    last = max((p for p in told if p.preview), key=lambda p: p.step).preview
    assert psnr(*(_tensor(i) for i in (last, image.resize(last.size)))) > 10, "of another picture"


def _tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image) / 255)


def test_previews_change_no_picture(model):
    (plain,) = model.generate("x", **SMALL)
    (watched,) = model.generate("x", previews=2, on_progress=lambda _: None, **SMALL)
    assert np.array_equal(np.asarray(plain), np.asarray(watched))


def test_cancel_ends_between_two_steps_and_the_model_is_usable(model, packs):
    (expected,) = model.generate("x", **SMALL)
    packs.clear()
    cancel = threading.Event()

    def at_the_second_step(progress: ImageProgress) -> None:
        if progress.step == 2:
            cancel.set()

    with pytest.raises(GenerationCancelled, match="cancelled with 0 of 2 images done"):
        model.generate(["x", "y"], on_progress=at_the_second_step, cancel=cancel, **SMALL)
    assert packs == [2, 2]
    (again,) = model.generate("x", **SMALL)
    assert np.array_equal(np.asarray(again), np.asarray(expected))


def test_images_that_are_done_before_a_cancel_are_kept(model):
    cancel, done = threading.Event(), []
    requests = [ImageRequest(prompt, 64, 48, 2) for prompt in PROMPTS]
    with pytest.raises(GenerationCancelled, match="cancelled with 2 of 4 images done"):
        for pixels in model.images(requests, pack=1, cancel=cancel):
            done.append(pixels)
            if len(done) == 2:
                cancel.set()
    assert [pixels.shape for pixels in done] == [(48, 64, 3)] * 2


def test_no_prompts_are_no_images(model):
    assert model.generate([]) == []


def test_a_size_off_the_grid_goes_up_to_it_with_a_warning(model):
    with pytest.warns(UserWarning, match="size: 50x60 is generated as 64x64"):
        (image,) = model.generate("x", size=(50, 60), steps=1)
    assert image.size == (64, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": (0, 64)}, "size[0]: must be 16 or greater, got 0"),
        ({"size": (64, 8192)}, "size[1]: must be between 16 and 4096, got 8192"),
        ({"size": (64, 8.0)}, "size[1]: must be a whole number, got 8.0"),
        ({"size": 64}, "size: must be (width, height) in pixels, got 64"),
        ({"size": "64x64"}, "size: must be (width, height) in pixels, got '64x64'"),
        ({"steps": 0}, "steps: must be between 1 and 200, got 0"),
        ({"num_images": 0}, "num_images: must be between 1 and 64, got 0"),
        ({"guidance": float("nan")}, "guidance: must be a finite number, got nan"),
        ({"seed": -1}, "seed: must be between"),
        ({"mu": "x"}, "mu: must be a finite number, got 'x'"),
        ({"negative_prompt": None}, "negative_prompt: must be text, got NoneType"),
        ({"prompt": None}, "prompt: must be text or a list of texts, got NoneType"),
        ({"prompt": ["x", 3]}, "prompt[1]: must be text, got int"),
        ({"pack": 0}, "pack: must be 1 or greater, got 0"),
        ({"pack": 1.5}, "pack: must be a whole number, got 1.5"),
        ({"previews": -1}, "previews: must be 0 or greater, got -1"),
        ({"previews": 2}, "previews: has no effect without on_progress"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_is_computed(model, packs, arguments, message):
    with pytest.raises(RequestError, match=re.escape(message)):
        model.generate(**{"prompt": "x", **SMALL, **arguments})
    assert packs == []


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"dtype": "int3"}, ConfigError),
        ({"quantization": "int4"}, ConfigError),
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
    monkeypatch.setattr(sys, "argv", [str(example), str(demo_model), "a red fox", "a blue house"])
    runpy.run_path(str(example), run_name="__main__")
    files = ["preview_0.png", "preview_1.png", "image_0.png", "image_1.png"]
    assert capsys.readouterr().out.split() == files
    for file in files:
        Image.open(tmp_path / file).load()


def test_the_code_of_the_page_runs(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Krea2, "load", lambda _: model)
    generate = Krea2.generate
    monkeypatch.setattr(Krea2, "generate", lambda *a, **b: generate(*a, **{**b, **SMALL}))
    monkeypatch.setattr(threading, "Timer", lambda _, end: SimpleNamespace(start=end))
    page = (Path(__file__).parents[2] / "docs" / "library.md").read_text()
    code = [line[4:] for line in page.splitlines() if line.startswith("    ") or not line]
    exec("\n".join(code), {})
    told = capsys.readouterr().out.splitlines()
    assert told[:2] == ["0 (128, 256, 3)", "1 (192, 128, 3)"]
    assert told[2:-1] == [f"image 0: step {step} of 3" for step in (1, 2, 3)]
    assert told[-1] == "cancelled with 0 of 8 images done"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fox.png", "preview_0.png"]


@pytest.mark.parametrize("pack", [0, -1])
def test_a_pack_has_at_least_one_image(model, pack):
    with pytest.raises(RequestError, match=f"pack: must be 1 or greater, got {pack}"):
        model.images([ImageRequest("x", 64, 48, 1)], pack=pack)


def test_limits_of_the_environment_hold(demo_model, monkeypatch):
    monkeypatch.setenv("KREA2_SRT_MAX_SIDE", "128")
    model = Krea2.load(demo_model, device="cpu", dtype="float32")
    with pytest.raises(RequestError, match=r"size\[0\]: must be between 16 and 128, got 256"):
        model.generate("x", size=(256, 64), steps=1)


def test_memory_that_runs_out_is_our_error(model, monkeypatch):
    def fails(_sequences):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model.runner, "step", fails)
    with pytest.raises(OutOfMemoryError, match="out of memory"):
        model.generate("x", **SMALL)
