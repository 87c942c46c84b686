"""ComfyUI's three files as one folder in the released layout."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from krea2_srt.convert.convert import convert_to_folder
from krea2_srt.errors import CheckpointError
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.model.text_encoder_files import text_config
from krea2_srt.model.vae_files import vae_config
from tests import dialects
from tests.single_files import write_dit_file, write_text_encoder_file, write_vae_file

ENCODER = "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def files(checkpoint, demo_model, tmp_path) -> Krea2Checkpoint:
    return replace(
        checkpoint,
        transformer=write_dit_file(demo_model / "transformer", tmp_path / "turbo.safetensors"),
        text_encoder=write_text_encoder_file(
            demo_model / "text_encoder", tmp_path / "qwen3vl.safetensors"
        ),
        vae=write_vae_file(demo_model / "vae", tmp_path / "vae.safetensors", config=True),
    )


def same(one: Path, other: Path) -> bool:
    ours, theirs = load_file(one), load_file(other)
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor)
        for name, tensor in theirs.items()
    )


def test_three_files_become_a_folder(files, demo_model, tmp_path):
    converted = convert_to_folder(files, tmp_path / "out")
    for name in (ENCODER, VAE, "transformer/diffusion_pytorch_model.safetensors"):
        assert same(tmp_path / "out" / name, demo_model / name), name
    assert converted.losses == converted.left_behind == ()
    assert converted.tensors == {"kept": 118}
    found = Krea2Checkpoint.from_folder(tmp_path / "out")
    assert vae_config(found.vae) == vae_config(demo_model / "vae")
    ours, theirs = text_config(found.text_encoder), text_config(demo_model / "text_encoder")
    # How long a prompt may be is nothing that a tensor says.
    for key in ours.keys() & theirs.keys() - {"max_position_embeddings"}:
        assert ours[key] == theirs[key], key


def test_transformers_and_diffusers_load_them_whole(files, tmp_path):
    from diffusers import AutoencoderKLQwenImage
    from transformers import Qwen3VLModel

    convert_to_folder(files, tmp_path / "out", shard_bytes=20 * 10**6)
    assert (tmp_path / "out" / "text_encoder" / "model.safetensors.index.json").is_file()
    for kind, part in ((Qwen3VLModel, "text_encoder"), (AutoencoderKLQwenImage, "vae")):
        _, info = kind.from_pretrained(tmp_path / "out" / part, output_loading_info=True)
        assert not info["missing_keys"], part
        assert not info["unexpected_keys"], part
        assert not info["mismatched_keys"], part


def test_8_bits_of_a_text_encoder_become_bfloat16(files, demo_model, tmp_path):
    def of_a_layer(name, tensor):
        return "layers." in name and dialects.all_matrices(name, tensor)

    file = tmp_path / "scaled.safetensors"
    meant = dialects.write_fp8_scaled(load_file(files.text_encoder), file, chooses=of_a_layer)
    converted = convert_to_folder(replace(files, text_encoder=file), tmp_path / "out")
    written = load_file(tmp_path / "out" / ENCODER)
    assert len(written) == len(meant)
    for name, tensor in meant.items():
        released = name.removeprefix("model.")
        assert torch.equal(written[released], tensor.to(written[released].dtype)), name
    kinds = {loss.kind for loss in converted.losses}
    assert "language_model.layers.*.self_attn.q_proj" in kinds
    assert all(loss.worst < 2**-8 for loss in converted.losses)


def test_what_the_layout_has_not_is_left_behind(files, tmp_path):
    tensors = load_file(files.text_encoder)
    save_file(tensors | {"lm_head.weight": torch.zeros(2, 2)}, files.text_encoder)
    converted = convert_to_folder(files, tmp_path / "out")
    assert converted.left_behind == ("qwen3vl.safetensors: lm_head.weight",)


@pytest.mark.parametrize(
    ("part", "prefix", "message"),
    [
        ("vae", "encoder.", r"vae\.safetensors: has no encoder half"),
        ("text_encoder", "model.visual.", r"qwen3vl\.safetensors: has no vision tower"),
        (
            "text_encoder",
            "model.visual.pos_embed",
            r"qwen3vl\.safetensors: tensor 'visual\.pos_embed\.weight' of the vision tower",
        ),
    ],
)
def test_what_the_layout_has_and_a_file_has_not_is_named(files, part, prefix, message, tmp_path):
    file = getattr(files, part)
    tensors = {n: t for n, t in load_file(file).items() if not n.startswith(prefix)}
    assert len(tensors) < len(load_file(file))
    config = json.dumps({"model_type": "qwen3_vl", "text_config": {}})
    if part == "vae":
        config = (files.tokenizer.parent / "vae" / "config.json").read_text()
    save_file(tensors, file, metadata={"config": config})
    with pytest.raises(CheckpointError, match=message):
        convert_to_folder(files, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("part", "changed", "message"),
    [
        ("vae", {"foo": torch.ones(1)}, r"vae\.safetensors: unexpected tensors: foo"),
        ("vae", {"decoder.head.2.bias": None}, "tensors are missing: decoder.conv_out.bias"),
        ("text_encoder", {"foo": torch.ones(1)}, "unexpected tensors: foo"),
        (
            "text_encoder",
            {"model.language_model.layers.3.mlp.up_proj.weight": None},
            r"tensors are missing: layers\.3\.mlp\.up_proj\.weight",
        ),
    ],
)
def test_a_part_that_cannot_be_loaded_is_told_before_it_is_written(
    files, part, changed, message, tmp_path
):
    file = getattr(files, part)
    tensors = {n: t for n, t in load_file(file).items() if n not in changed}
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    added = {name: tensor for name, tensor in changed.items() if tensor is not None}
    save_file(tensors | added, file, metadata)
    with pytest.raises(CheckpointError, match=message):
        convert_to_folder(files, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_single_number_in_8_bits_becomes_bfloat16(files, tmp_path):
    number = torch.tensor(1.5).to(torch.float8_e4m3fn)
    save_file(load_file(files.text_encoder) | {"model.visual.x": number}, files.text_encoder)
    convert_to_folder(files, tmp_path / "out")
    written = load_file(tmp_path / "out" / ENCODER)["visual.x"]
    assert torch.equal(written, number.to(torch.bfloat16))
