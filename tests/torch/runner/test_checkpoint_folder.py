"""What is wrong with a checkpoint is said in one line, before anything is loaded."""

import json
from pathlib import Path

import pytest
import torch

from krea2_srt.errors import CheckpointError
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.hub import find_checkpoint
from krea2_srt.runner.model_runner import Krea2Runner
from tests.comparisons import CPU
from tests.conftest import clone_checkpoint


@pytest.fixture
def checkpoint(demo_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "krea-2"
    clone_checkpoint(demo_model, folder)
    return folder


def edit_json(file: Path, **values: object) -> None:
    # A linked part is replaced by a copy first, so that the shared checkpoint stays whole.
    part = file.parent
    if part.is_symlink():
        source = part.resolve()
        part.unlink()
        part.mkdir()
        for entry in source.iterdir():
            (part / entry.name).symlink_to(entry)
    content = json.loads(file.read_text()) | values
    if file.is_symlink():
        file.unlink()
    file.write_text(json.dumps(content))


def test_sampling_is_read(demo_model, raw_demo_model):
    turbo = Krea2Checkpoint.from_folder(demo_model).sampling
    raw = Krea2Checkpoint.from_folder(raw_demo_model).sampling
    assert (turbo.default_steps, turbo.default_guidance) == (8, 0.0)
    assert (raw.default_steps, raw.default_guidance) == (52, 3.5)
    assert turbo.schedule(8, 256) == turbo.schedule(8, 4096)
    assert raw.schedule(8, 256) != raw.schedule(8, 4096)
    assert raw.schedule(8, 256, mu=1.15) == turbo.schedule(8, 256)


def test_the_side_of_a_small_checkpoint_is_read(checkpoint):
    sampling = Krea2Checkpoint.from_folder(checkpoint).sampling
    assert (sampling.trained_side, sampling.default_side) == (2048, 1024)
    edit_json(checkpoint / "model_index.json", _trained_side=256)
    sampling = Krea2Checkpoint.from_folder(checkpoint).sampling
    assert (sampling.trained_side, sampling.default_side) == (256, 256)


@pytest.mark.parametrize("side", [0, 250, -16, 256.0, True, "256", None])
def test_a_side_that_no_picture_has(checkpoint, side):
    edit_json(checkpoint / "model_index.json", _trained_side=side)
    with pytest.raises(CheckpointError, match="_trained_side must be a multiple"):
        Krea2Checkpoint.from_folder(checkpoint)


def test_a_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        Krea2Checkpoint.from_folder(tmp_path / "nothing")


def test_another_pipeline(checkpoint):
    edit_json(checkpoint / "model_index.json", _class_name="FluxPipeline")
    with pytest.raises(CheckpointError, match="'FluxPipeline', expected 'Krea2Pipeline'"):
        Krea2Checkpoint.from_folder(checkpoint)


@pytest.mark.parametrize(
    "part", ["transformer", "text_encoder", "vae", "scheduler", "model_index.json"]
)
def test_a_missing_part(checkpoint, part):
    (checkpoint / part).unlink()
    with pytest.raises(CheckpointError, match=part):
        Krea2Checkpoint.from_folder(checkpoint)


def test_select_layers_that_the_transformer_does_not_read(checkpoint):
    edit_json(checkpoint / "model_index.json", text_encoder_select_layers=[1, 2, 3])
    with pytest.raises(CheckpointError, match=r"3 layers of width 64.*reads 12"):
        Krea2Runner.load(Krea2Checkpoint.from_folder(checkpoint), CPU, torch.float32)


@pytest.mark.parametrize("select_layers", ["all", [-1], [2.5], [2, "5"]])
def test_select_layers_that_are_no_layers(checkpoint, select_layers):
    edit_json(checkpoint / "model_index.json", text_encoder_select_layers=select_layers)
    with pytest.raises(CheckpointError, match="text_encoder_select_layers"):
        Krea2Checkpoint.from_folder(checkpoint)


@pytest.mark.parametrize("layer", [36, 40])
def test_a_selected_layer_that_is_normed_or_beyond(checkpoint, layer):
    edit_json(checkpoint / "model_index.json", text_encoder_select_layers=[*range(11), layer])
    with pytest.raises(
        CheckpointError, match=f"36 layers, .*select_layers needs more than {layer}"
    ):
        Krea2Runner.load(Krea2Checkpoint.from_folder(checkpoint), CPU, torch.float32)


def test_another_text_encoder(checkpoint):
    edit_json(checkpoint / "text_encoder" / "config.json", model_type="t5")
    with pytest.raises(CheckpointError, match="model_type is 't5'"):
        Krea2Runner.load(Krea2Checkpoint.from_folder(checkpoint), CPU, torch.float32)


def test_a_tokenizer_without_its_files(checkpoint):
    (checkpoint / "tokenizer").unlink()
    (checkpoint / "tokenizer").mkdir()
    with pytest.raises(CheckpointError, match="tokenizer"):
        Krea2Runner.load(Krea2Checkpoint.from_folder(checkpoint), CPU, torch.float32)


def test_an_original_file_says_by_its_name_which_it_is(original_file, demo_model, tmp_path):
    parts = {"text_encoder": str(demo_model / "text_encoder"), "vae": str(demo_model)}
    assert find_checkpoint(str(original_file), **parts).sampling.distilled
    unnamed = tmp_path / "model.safetensors"
    unnamed.symlink_to(original_file)
    with pytest.raises(CheckpointError, match="Turbo or Raw"):
        find_checkpoint(str(unnamed), **parts)
    assert not find_checkpoint(str(unnamed), recipe="raw", **parts).sampling.distilled


def test_the_original_codes_environment_variables(original_file, demo_model, monkeypatch):
    monkeypatch.setenv("OSS_RAW", str(original_file))
    parts = {"text_encoder": str(demo_model / "text_encoder"), "vae": str(demo_model)}
    checkpoint = find_checkpoint("oss_raw", **parts)
    assert checkpoint.transformer == original_file
    assert not checkpoint.sampling.distilled
    runner = Krea2Runner.load(checkpoint, CPU, torch.float32)
    assert runner.dit.config == Krea2Config.from_dict(
        json.loads((demo_model / "transformer" / "config.json").read_text())
    )


@pytest.mark.parametrize("name", ["nothing", "./no/such", "/no/such", "no/such/repo"])
def test_a_name_that_is_nothing(name):
    with pytest.raises(CheckpointError, match="does not exist"):
        find_checkpoint(name)


def test_a_repo_without_network():
    with pytest.raises(CheckpointError, match="cannot be reached"):
        find_checkpoint("krea/Krea-2-Turbo")
