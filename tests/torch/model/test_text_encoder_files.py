"""Text encoders as single files: names, configs, and what is no Qwen3-VL."""

import json
import logging
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from krea2_srt.errors import CheckpointError
from krea2_srt.model.text_encoder import (
    DEFAULT_SELECT_LAYERS,
    empty_text_model,
    load_text_encoder,
    text_model,
)
from krea2_srt.model.text_encoder_files import config_from_shapes, open_text_encoder, text_config
from tests import dialects
from tests.comparisons import CPU
from tests.single_files import with_damaged_headers, write_text_encoder_file

COMFY = "text_encoders.qwen3vl_4b.transformer."

RELEASED = {
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "max_position_embeddings": 262144,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "mrope_interleaved": True,
        "mrope_section": [24, 20, 20],
        "rope_type": "default",
    },
    "rope_theta": 5000000,
    "vocab_size": 151936,
}
"""What the released Qwen3-VL-4B-Instruct's config says of its text model."""


@pytest.fixture(scope="module")
def folder(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's, of few words, as most of its bytes are theirs."""
    copy = tmp_path_factory.mktemp("models") / "text_encoder"
    copy.mkdir()
    config = json.loads((demo_model / "text_encoder" / "config.json").read_text())
    config["text_config"]["vocab_size"] = 512
    (copy / "config.json").write_text(json.dumps(config))
    tensors = load_file(demo_model / "text_encoder" / "model.safetensors")
    words = "language_model.embed_tokens.weight"
    tensors[words] = tensors[words][:512].clone()
    save_file(tensors, copy / "model.safetensors")
    return copy


def load(path: Path, model: Path):
    return load_text_encoder(path, model / "tokenizer", DEFAULT_SELECT_LAYERS, CPU, torch.float32)


@pytest.fixture(scope="module")
def encoder(demo_model: Path, folder: Path):
    return load(folder, demo_model)


@pytest.fixture(scope="module")
def empty(folder: Path):
    return text_model(folder, DEFAULT_SELECT_LAYERS, torch.float32)[0]


@pytest.fixture
def file(folder: Path, tmp_path: Path) -> Path:
    """As ComfyUI's."""
    return write_text_encoder_file(folder, tmp_path / "qwen3vl_4b_bf16.safetensors")


@pytest.fixture(autouse=True)
def one_tokenizer(encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading it anew for every file takes longer than the file."""
    from transformers import AutoTokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: encoder.tokenizer)


def rewrite(file: Path, edit, **metadata: str) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata=metadata or None)


def sizes(encoder) -> dict[str, object]:
    # The longest prompt that it takes leaves no trace, and changes nothing for shorter ones.
    return encoder.model.config.to_dict() | {"max_position_embeddings": None}


def assert_same(found, expected) -> None:
    assert sizes(found) == sizes(expected)
    theirs = expected.model.state_dict()
    ours = found.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(found.model.rotary_emb.inv_freq, expected.model.rotary_emb.inv_freq)


def test_the_config_from_released_shapes_is_the_released_one():
    from transformers import Qwen3VLTextConfig, Qwen3VLTextModel

    released = Qwen3VLTextConfig(**RELEASED)
    with torch.device("meta"):
        model = Qwen3VLTextModel(released)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    found = config_from_shapes(shapes)
    assert Qwen3VLTextConfig(**found).to_dict() == released.to_dict()
    _, rotary = empty_text_model(found, 35, torch.float32)
    assert torch.equal(rotary.inv_freq, type(rotary)(config=released).inv_freq)


def test_a_file_of_transformers_own_names(demo_model, folder, encoder, tmp_path):
    """Those of the class that the released checkpoint is saved from, tied head included."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = Qwen3VLConfig(**json.loads((folder / "config.json").read_text()))
    with torch.device("meta"):
        names = Qwen3VLForConditionalGeneration(config).state_dict().keys()
    tensors = load_file(folder / "model.safetensors")
    embeddings = tensors["language_model.embed_tokens.weight"]
    assert names == {f"model.{name}" for name in tensors} | {"lm_head.weight"}
    of = {name: tensors.get(name.removeprefix("model."), embeddings) for name in names}
    save_file({n: t.clone() for n, t in of.items()}, tmp_path / "model.safetensors")
    assert_same(load(tmp_path / "model.safetensors", demo_model), encoder)


@pytest.mark.parametrize(
    ("text", "vision"),
    [
        ("language_model.", "visual."),
        ("model.", "model.visual."),  # as ComfyUI writes it
        ("model.", "visual."),
        (f"{COMFY}model.", f"{COMFY}visual."),
        ("qwen3vl_4b.transformer.model.", "qwen3vl_4b.transformer.visual."),
        ("cond_stage_model.language_model.model.", "cond_stage_model.visual."),
        ("text_encoder.model.language_model.", None),
    ],
)
def test_names_with_any_prefix(folder, empty, tmp_path, text, vision):
    file = tmp_path / "encoder.safetensors"
    write_text_encoder_file(folder, file, text=text, vision=vision)
    expected = load_file(folder / "model.safetensors")
    with open_text_encoder(file) as stored:
        for name, tensor in stored.tensors.items():
            root = "" if name.startswith("visual.") else "language_model."
            assert tensor.shape == tuple(expected.pop(root + name).shape)
    assert all(name.startswith("visual.") for name in expected)
    assert bool(expected) == (vision is None)
    model, _ = text_model(file, DEFAULT_SELECT_LAYERS, torch.float32)
    assert [p.shape for p in model.parameters()] == [p.shape for p in empty.parameters()]


def test_a_file_with_its_config_is_its_folder(demo_model, folder, encoder, tmp_path):
    """It holds the text model alone, which nothing else would tell from a Qwen3."""
    file = tmp_path / "encoder.safetensors"
    write_text_encoder_file(folder, file, text="model.", vision=None, config=True)
    assert text_config(file) == text_config(folder)
    assert_same(load(file, demo_model), encoder)


def test_the_config_beside_a_file_is_read(folder, tmp_path):
    file = tmp_path / "encoder.safetensors"
    write_text_encoder_file(folder, file, text="model.", vision=None)
    shutil.copy(folder / "config.json", tmp_path)
    assert text_config(file) == text_config(folder)


def test_a_file_in_another_float_dtype(demo_model, encoder, file):
    def cast(tensors):
        tensors.update({name: tensor.half() for name, tensor in tensors.items()})

    rewrite(file, cast)
    found = load(file, demo_model).model.state_dict()
    for name, tensor in encoder.model.state_dict().items():
        assert torch.equal(found[name], tensor.half().float()), name


def blocks_only(name: str, tensor: torch.Tensor) -> bool:
    return dialects.all_matrices(name, tensor) and "embed" not in name


@pytest.mark.parametrize(
    ("ending", "write", "line"),
    [
        (
            "safetensors",
            partial(dialects.write_fp8_scaled, marker="scaled_fp8", chooses=blocks_only),
            r"245 matrices fp8_scaled, dequantised to float32; 141 tensors bf16",
        ),
        ("gguf", partial(dialects.write_gguf, architecture="qwen3vl", chooses=blocks_only), "Q8_0"),
    ],
)
def test_a_quantised_file_is_its_dequantised_twin(
    demo_model, file, tmp_path, caplog, ending, write, line
):
    quantised = tmp_path / f"quantised.{ending}"
    means = write(load_file(file), quantised)
    with caplog.at_level(logging.INFO):
        found = load(quantised, demo_model).model.state_dict()
    for name, tensor in found.items():
        assert torch.equal(tensor, means[f"model.language_model.{name}"]), name
    (record,) = [r for r in caplog.records if r.name == "krea2_srt.model.text_encoder"]
    assert re.search(line, record.message)


def test_what_may_be_a_qwen3_is_refused(folder, tmp_path):
    """It has the same shapes; with its weights pictures would be of nothing that was asked for."""
    file = tmp_path / "qwen_3_4b.safetensors"
    write_text_encoder_file(folder, file, text="model.", vision=None)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(CheckpointError, match=r"may be a Qwen3-VL or a Qwen3, .*vision tower"):
        text_config(file)


ATTENTION = "model.language_model.layers.0.self_attn."


def renamed_to(*names: str):
    """Makes a file hold other tensors."""

    def edit(tensors):
        tensors.clear()
        tensors.update({name: torch.zeros(2, 2) for name in names})

    return edit


def narrower(name: str):
    def edit(tensors):
        tensors[name] = tensors[name][:-1].contiguous()

    return edit


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda t: t.pop(f"{ATTENTION}q_norm.weight"), "is a language model without q_norm"),
        (lambda t: t.pop(f"{ATTENTION}k_norm.weight"), r"missing: layers\.0\.self_attn\.k_norm"),
        (
            lambda t: t.pop("model.language_model.embed_tokens.weight"),
            r"tensor 'embed_tokens\.weight' is missing",
        ),
        (
            lambda t: t.pop("model.language_model.layers.34.mlp.up_proj.weight"),
            r"missing: layers\.34\.mlp\.up_proj\.weight",
        ),
        (
            lambda t: t.update({f"{ATTENTION}q_proj.bias": torch.zeros(128)}),
            r"is a Qwen2\.5-VL or Qwen2-VL, Krea 2 needs Qwen3-VL-4B",
        ),
        (lambda t: t.update(surprise=torch.zeros(1)), "unexpected tensors: surprise"),
        (
            lambda t: t.update({f"{ATTENTION}sinks": torch.zeros(2)}),
            r"unexpected tensors: layers\.0\.self_attn\.sinks",
        ),
        (
            lambda t: t.update({"model.language_model.layers.35.surprise": torch.zeros(2)}),
            r"unexpected tensors: layers\.35\.surprise",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(64)}),
            r"norm\.weight and .*norm\.weight are names of the same tensor",
        ),
        (narrower(f"{ATTENTION}o_proj.weight"), r"o_proj\.weight has shape \[63, 128\]"),
        (
            narrower(f"{ATTENTION}q_norm.weight"),
            "not a Qwen3-VL: heads of 63 channels do not make up 128 and 64",
        ),
        (renamed_to("encoder.block.0.layer.0.SelfAttention.q.weight"), "is a T5"),
        (renamed_to("text_model.encoder.layers.0.mlp.fc1.weight"), "is a CLIP"),
        (renamed_to("token_embd.weight", "blk.0.attn_q.weight"), r"llama\.cpp's names"),
        (renamed_to("model.layers.0.mlp.experts.0.up_proj.weight"), "a mixture of experts"),
        (renamed_to("model.layers.0.linear_attn.in_proj.weight"), r"is a Qwen3\.5"),
        (renamed_to("model.layers.0.pre_feedforward_layernorm.weight"), "is a Gemma"),
        (renamed_to("model.layers.0.self_attn.q_proj.bias"), r"is a Qwen2\.5 or Qwen2,"),
        (renamed_to("visual.blocks.0.norm1.weight"), r"not a Qwen3-VL: tensor .* is missing"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_name(demo_model, file, edit, named):
    rewrite(file, edit)
    with pytest.raises(CheckpointError, match=named) as refused:
        load(file, demo_model)
    assert str(refused.value).startswith(str(file))
    assert "\n" not in str(refused.value)


def test_a_file_of_too_few_layers_is_refused(demo_model, file):
    def cut(tensors):
        for name in [name for name in tensors if ".layers.35." in name]:
            del tensors[name]

    rewrite(file, cut)
    with pytest.raises(CheckpointError, match=r"has 35 layers, .*select_layers needs more than 35"):
        load(file, demo_model)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ("no JSON", "config in its metadata cannot be read"),
        ('{"model_type": "qwen3"}', "config in its metadata: model_type is 'qwen3', expected"),
        ('{"model_type": "qwen3_vl"}', "config in its metadata: no text_config in it"),
        (
            '{"model_type": "qwen3_vl", "text_config": {"num_hidden_layers": 36, "head_dim": "x"}}',
            "its config is not valid",
        ),
        (  # RoPE's frequencies for it would take 4 GB
            '{"model_type": "qwen3_vl", "text_config": {"head_dim": 2000000000}}',
            "head_dim must be from 1 to 1024, got 2000000000",
        ),
        (  # black pictures
            '{"model_type": "qwen3_vl", "text_config": {"rms_norm_eps": NaN}}',
            "rms_norm_eps must be a positive number, got nan",
        ),
    ],
)
def test_metadata_that_is_no_config_is_refused(demo_model, file, config, named):
    rewrite(file, lambda tensors: None, config=config)
    with pytest.raises(CheckpointError, match=named):
        load(file, demo_model)


@pytest.mark.parametrize(
    ("part", "named"), [("transformer", "is a Krea 2 transformer"), ("vae", "is a VAE")]
)
def test_another_part_is_refused(demo_model, part, named):
    file = demo_model / part / "diffusion_pytorch_model.safetensors"
    with pytest.raises(CheckpointError, match=f"{named}, Krea 2 needs Qwen3-VL-4B"):
        text_config(file)


def test_an_extra_tensor_in_a_folder_is_named(demo_model, folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    tensors = load_file(folder / "model.safetensors") | {"surprise": torch.zeros(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="unexpected tensors: surprise"):
        load(tmp_path, demo_model)


def test_a_damaged_header_is_one_line_or_read(file):
    """Nothing takes forever, or all memory."""
    refused = []
    for _ in with_damaged_headers(file, 40):
        try:
            text_model(file, DEFAULT_SELECT_LAYERS, torch.float32)
        except CheckpointError as error:
            refused.append(str(error))
    assert len(refused) > 15
    assert not any("\n" in line for line in refused)
