"""Checkpoints from one layout to the other, with the same numbers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from krea2_srt.convert.convert import convert_to_file, convert_to_folder
from krea2_srt.errors import CheckpointError
from krea2_srt.model.dit_files import dit_config, load_dit
from tests.comparisons import CPU, PROMPT
from tests.torch.cli.test_demo_model import digest

WEIGHTS = "diffusion_pytorch_model.safetensors"


def same_tensors(one: Path, other: Path) -> bool:
    ours, theirs = load_file(one), load_file(other)
    assert ours.keys() == theirs.keys()
    return all(
        ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor)
        for name, tensor in theirs.items()
    )


def single_file(checkpoint, file: Path):
    """The same checkpoint, with its DiT as a single file."""
    return replace(checkpoint, transformer=file)


def test_a_folder_is_written_as_it_was(checkpoint, demo_model, tmp_path):
    converted = convert_to_folder(checkpoint, tmp_path / "again")
    assert digest(tmp_path / "again") == digest(demo_model)
    assert converted.tensors == {"kept": 118}
    assert converted.losses == converted.left_behind == ()
    assert converted.bytes_before == converted.bytes_after
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
    for path in (tmp_path / "again").rglob("*"):
        assert path.stat().st_mode & 0o044 == 0o044, f"{path} cannot be read by other users"


def test_names_go_to_the_original_and_back_byte_for_byte(
    checkpoint, demo_model, original_file, tmp_path
):
    file = tmp_path / "file.safetensors"
    convert_to_file(checkpoint.transformer, checkpoint.sampling, file)
    assert same_tensors(file, original_file)
    convert_to_folder(single_file(checkpoint, file), tmp_path / "folder")
    assert digest(tmp_path / "folder") == digest(demo_model)


def test_a_single_file_becomes_a_folder_that_diffusers_loads(
    checkpoint, original_file, diffusers_pipeline, load_diffusers, tmp_path
):
    """In several weight files, and with a config and a scheduler that no file had."""
    file = tmp_path / "turbo.safetensors"
    prefix = "model.diffusion_model."
    save_file({prefix + name: tensor for name, tensor in load_file(original_file).items()}, file)
    folder = tmp_path / "krea-2-folder"
    convert_to_folder(single_file(checkpoint, file), folder, shard_bytes=4 * 10**6)
    names = sorted(path.name for path in (folder / "transformer").glob("*.safetensors"))
    assert names == [f"diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert all((folder / "transformer" / n).stat().st_size < 4.1e6 for n in names)
    ours = load_dit(folder / "transformer", CPU, torch.float32).state_dict()
    expected = load_dit(checkpoint.transformer, CPU, torch.float32).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())

    def picture(pipeline):
        return pipeline(
            PROMPT,
            width=64,
            height=64,
            num_inference_steps=2,
            guidance_scale=0.0,
            generator=torch.Generator().manual_seed(0),
        ).images[0]

    loaded = load_diffusers(folder, torch.float32)
    assert loaded.config.is_distilled
    assert np.array_equal(np.asarray(picture(loaded)), np.asarray(picture(diffusers_pipeline)))


def test_the_recipe_goes_into_what_is_written(checkpoint, tmp_path):
    raw = replace(checkpoint, sampling=replace(checkpoint.sampling, distilled=False))
    convert_to_folder(raw, tmp_path / "raw")
    assert json.loads((tmp_path / "raw" / "model_index.json").read_text())["is_distilled"] is False
    convert_to_file(raw.transformer, raw.sampling, tmp_path / "file.safetensors")
    with safe_open(tmp_path / "file.safetensors", framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["modelspec.title"] == "Krea 2 Raw"
    assert json.loads(metadata["config"])["is_distilled"] is False


def test_a_file_tells_what_leaves_no_trace_in_shapes(checkpoint, tmp_path):
    changed = tmp_path / "transformer"
    changed.mkdir()
    (changed / WEIGHTS).symlink_to(checkpoint.transformer / WEIGHTS)
    config = json.loads((checkpoint.transformer / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"norm_eps": 1e-6}))
    file = tmp_path / "file.safetensors"
    convert_to_file(changed, checkpoint.sampling, file)
    assert dit_config(file).norm_eps == 1e-6
    assert dit_config(file) == dit_config(changed)


@pytest.mark.parametrize(
    "told", ["no JSON", "[" * 100_000, "[1]", '{"transformer": {"num_layers": 3}}']
)
def test_what_others_call_config_is_theirs(checkpoint, original_file, told, tmp_path):
    file = tmp_path / "file.safetensors"
    save_file(load_file(original_file), file, metadata={"config": told})
    assert dit_config(file) == dit_config(original_file)


def test_a_config_in_a_file_that_is_impossible_names_the_file(original_file, tmp_path):
    file = tmp_path / "file.safetensors"
    config = {"_class_name": "Krea2Transformer2DModel", "num_layers": -1}
    save_file(load_file(original_file), file, metadata={"config": json.dumps(config)})
    with pytest.raises(CheckpointError, match=r"file\.safetensors: num_layers must be a positive"):
        dit_config(file)


def test_a_text_encoder_from_a_repo_of_its_own(checkpoint, original_file, demo_model, tmp_path):
    """Qwen's repo has the tokenizer beside the weights, and much else."""
    repo = tmp_path / "Qwen3-VL"
    repo.mkdir()
    for part in ("text_encoder", "tokenizer"):
        for file in (demo_model / part).iterdir():
            (repo / file.name).symlink_to(file)
    (repo / "README.md").touch()
    (repo / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "model.safetensors"}})
    )
    mixed = replace(checkpoint, transformer=original_file, text_encoder=repo, tokenizer=repo)
    convert_to_folder(mixed, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out" / "tokenizer").iterdir()} == {
        *("config.json", "tokenizer.json", "tokenizer_config.json")
    }
    encoder = {path.name for path in (tmp_path / "out" / "text_encoder").iterdir()}
    assert "README.md" not in encoder
    assert encoder >= {"config.json", "model.safetensors", "model.safetensors.index.json"}
