"""A model of single files, as people have them, is the model of the folder they were made from."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from krea2_srt.errors import CheckpointError
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.model.vae_config import LATENTS_MEAN
from krea2_srt.request import ImageRequest
from krea2_srt.runner import model_runner
from krea2_srt.runner.generation import Generation
from krea2_srt.runner.model_runner import Krea2Runner
from krea2_srt.runner.part_sizes import checkpoint_sizes
from tests.comparisons import CPU
from tests.dialects import write_fp8_scaled, write_gguf, write_int8
from tests.single_files import write_dit_file, write_text_encoder_file, write_vae_file

FLOAT32 = torch.float32


@pytest.fixture(scope="module")
def folder(trained_model: Path) -> Krea2Checkpoint:
    return Krea2Checkpoint.from_folder(trained_model)


@pytest.fixture(scope="module")
def files(folder: Krea2Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Krea2Checkpoint:
    """The same, as ComfyUI's three files. The VAE's latents have statistics of their own."""
    models = tmp_path_factory.mktemp("comfyui")
    text_encoder = models / "qwen3vl_4b_bf16.safetensors"
    return replace(
        folder,
        transformer=write_dit_file(folder.transformer, models / "krea2_turbo_bf16.safetensors"),
        text_encoder=write_text_encoder_file(folder.text_encoder, text_encoder, config=True),
        vae=write_vae_file(folder.vae, models / "qwen_image_vae.safetensors", config=True),
    )


def picture(checkpoint: Krea2Checkpoint) -> torch.Tensor:
    runner = Krea2Runner.load(checkpoint, CPU, FLOAT32)
    image = ImageRequest("a red circle on blue", 128, 96, steps=2, seed=3)
    generation = Generation(runner, [image])
    while pending := generation.pending:
        generation.step(pending)
    return torch.from_numpy(generation.pixels(generation.states[0]))


def test_pixels_are_those_of_the_folder(folder, files):
    found, expected = picture(files), picture(folder)
    assert torch.equal(found, expected)
    assert expected.float().std() > 10


@pytest.mark.parametrize("write", [write_fp8_scaled, write_int8, write_gguf])
def test_a_picture_is_that_of_what_the_file_means(files, tmp_path, write):
    meant = write(load_file(files.transformer), tmp_path / "stored")
    save_file(meant, tmp_path / "twin.safetensors")
    names = ("stored", "twin.safetensors")
    stored, twin = (picture(replace(files, transformer=tmp_path / name)) for name in names)
    assert (stored.int() - twin.int()).abs().max() <= 1


def test_the_statistics_of_latents_come_from_the_file(folder, files):
    vae = model_runner.load_vae(files.vae, CPU, FLOAT32)
    assert vae.config == model_runner.load_vae(folder.vae, CPU, FLOAT32).config
    assert vae.config.latents_mean != LATENTS_MEAN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_planned_as_for_the_folder(folder, files, dtype):
    def sizes(checkpoint):
        return checkpoint_sizes(checkpoint, dtype, dtype, dtype, None)

    assert sizes(files) == sizes(folder)


def test_each_part_may_be_a_file_or_a_folder(folder, files):
    expected = checkpoint_sizes(folder, FLOAT32, FLOAT32, FLOAT32, None)
    for part in ("transformer", "text_encoder", "vae"):
        mixed = replace(folder, **{part: getattr(files, part)})
        assert checkpoint_sizes(mixed, FLOAT32, FLOAT32, FLOAT32, None) == expected


def wide_encoder(files: Krea2Checkpoint, tmp_path: Path) -> Krea2Checkpoint:
    """As a Qwen3-VL-8B's is to Krea 2."""
    wide = load_file(files.text_encoder)
    for name, tensor in wide.items():
        if ".language_model." not in name or name.endswith(("q_norm.weight", "k_norm.weight")):
            continue
        # The stream is what comes out of these, and goes into all others.
        rows = tensor.dim() == 1 or name.endswith(("o_proj.weight", "down_proj.weight"))
        wide[name] = torch.cat([tensor, tensor], dim=0 if rows else 1)
    save_file(wide, tmp_path / "wide.safetensors")
    return replace(files, text_encoder=tmp_path / "wide.safetensors")


def vae_for_text(files: Krea2Checkpoint, tmp_path: Path) -> Krea2Checkpoint:
    return replace(files, text_encoder=files.vae)


def transformer_for_vae(files: Krea2Checkpoint, tmp_path: Path) -> Krea2Checkpoint:
    return replace(files, vae=files.transformer)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (wide_encoder, r"wide\.safetensors: gives 12 layers of width 128, .*reads 12 of width 64"),
        (vae_for_text, r"qwen_image_vae\.safetensors: is a VAE, Krea 2 needs Qwen3-VL-4B"),
        (transformer_for_vae, r"krea2_turbo_bf16\.safetensors: is a diffusion transformer"),
    ],
)
def test_a_part_of_another_model_is_refused_before_any_is_read(
    files, tmp_path, monkeypatch, wrong, named
):
    def never(*args: object) -> None:
        raise AssertionError("a part was read")

    checkpoint = wrong(files, tmp_path)
    for load in ("load_dit", "load_text_encoder", "load_vae"):
        monkeypatch.setattr(model_runner, load, never)
    with pytest.raises(CheckpointError, match=named):
        Krea2Runner.load(checkpoint, CPU, FLOAT32)
