import json

import pytest

from krea2_srt.errors import CheckpointError
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.dit_files import (
    config_dict,
    diffusers_name,
    original_name,
    read_config,
    stored_shapes,
)


def test_the_defaults_are_the_released_model():
    config = Krea2Config()
    assert config.hidden_size == 6144
    shapes = stored_shapes(config)
    assert shapes["transformer_blocks.27.attn.to_k.weight"] == (12 * 128, 6144)
    assert shapes["transformer_blocks.27.ff.down.weight"] == (6144, 16384)
    assert "transformer_blocks.28.norm1.weight" not in shapes


def test_sizes_derived_from_shapes_are_those_of_the_config():
    config = Krea2Config()
    assert Krea2Config.from_shapes(stored_shapes(config)) == config


def test_names_of_the_original_file_translate_both_ways():
    names = stored_shapes(Krea2Config())
    originals = {original_name(name) for name in names}
    assert {diffusers_name(name) for name in originals} == set(names)
    # A sample of the original code's own module names.
    assert {
        "first.weight",
        "blocks.3.mod.lin",
        "blocks.3.attn.wq.weight",
        "blocks.3.attn.qknorm.knorm.scale",
        "blocks.3.attn.gate.weight",
        "blocks.3.mlp.gate.weight",
        "blocks.3.postnorm.scale",
        "txtfusion.projector.weight",
        "txtfusion.refiner_blocks.1.attn.wo.weight",
        "txtmlp.0.scale",
        "txtmlp.3.bias",
        "tmlp.2.weight",
        "tproj.1.bias",
        "last.modulation.lin",
        "last.norm.scale",
        "last.linear.bias",
    } <= originals


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "_class_name"),
        ({"num_layers": 0}, "num_layers"),
        ({"num_layers": "28"}, "num_layers"),
        ({"norm_eps": -1}, "norm_eps"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
        ({"axes_dims_rope": [32, 48, 47]}, "axes_dims_rope"),
        ({"axes_dims_rope": [32, 48, 46]}, "axes_dims_rope"),
        ({"axes_dims_rope": [128]}, "axes_dims_rope"),
        ({"axes_dims_rope": 128}, "axes_dims_rope"),
        ({"axes_dims_rope": ["a", "b", "c"]}, "axes_dims_rope"),
        ({"num_layers": 28.5}, "num_layers"),
        ({"num_layers": True}, "num_layers"),
        ({"num_attention_heads": 48.0}, "num_attention_heads"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"num_layers": None}, "num_layers"),
    ],
)
def test_an_impossible_config_names_its_field(tmp_path, change, named):
    values = {"_class_name": "Krea2Transformer2DModel", **config_dict(Krea2Config()), **change}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=named) as error:
        read_config(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_a_config_that_is_not_json_is_named(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)
