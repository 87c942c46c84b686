"""Turbo or Raw comes from what a checkpoint says, then from whole words of its name, or is asked
for.
"""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from krea2_srt.errors import CheckpointError
from krea2_srt.model.recipe import is_turbo

TURBO, RAW = True, False
NAMES = [
    ("krea2-turbo-drawn", TURBO),
    ("krea2_turbo_fp8_scaled", TURBO),
    ("Krea2_Turbo_convrot_int8mixed", TURBO),
    ("pornmasterKrea2_turboV2FP8", TURBO),
    ("krea2Turbo", TURBO),
    ("OSS_TURBO", TURBO),
    ("Krea-2-Raw", RAW),
    ("krea2 raw (bf16)", RAW),
    ("krea2_hand_drawn_v1", None),
    ("strawberry_mix", None),
    ("turbocharged", None),
    ("raw_vs_turbo_merge", None),
    ("krea2", None),
    ("", None),
]


def a_file(folder: Path, stem: str = "model", /, **metadata: str) -> Path:
    file = folder / f"{stem}.safetensors"
    save_file({"first.weight": np.zeros(1, np.float32)}, file, metadata or None)
    return file


def recipe_of(transformer: Path, *names: str, replaced: bool = False, **index: object) -> bool:
    return is_turbo(
        "the model", index=index, transformer=transformer, replaced=replaced, names=names
    )


def ask(transformer: Path, *names: str, **more: object) -> str:
    with pytest.raises(CheckpointError) as error:
        recipe_of(transformer, *names, **more)
    return str(error.value)


@pytest.mark.parametrize(("name", "recipe"), NAMES)
def test_only_whole_words_of_a_name_count(tmp_path, name, recipe):
    file = a_file(tmp_path)
    if recipe is not None:
        assert recipe_of(file, name) is recipe
        return
    said = ask(file, name)
    assert said == (
        "nothing says whether the model is Turbo or Raw: give --recipe turbo or --recipe raw "
        "(KREA2_SRT_RECIPE for SGLang's commands)"
    )


def test_the_first_name_that_says_something_counts(tmp_path):
    assert recipe_of(a_file(tmp_path), "oss_raw", "krea2-turbo") is RAW
    assert recipe_of(a_file(tmp_path), "mix", "krea2-turbo") is TURBO


@pytest.mark.parametrize("recipe", [TURBO, RAW])
def test_the_index_comes_before_all_else(tmp_path, recipe):
    (tmp_path / "config.json").write_text(json.dumps({"is_distilled": not recipe}))
    name = "raw" if recipe else "turbo"
    assert recipe_of(tmp_path, name, is_distilled=recipe) is recipe


def test_then_comes_the_transformers_config(tmp_path):
    (tmp_path / "config.json").write_text('{"is_distilled": true}')
    assert recipe_of(tmp_path, "krea-2-raw") is TURBO
    (tmp_path / "config.json").write_text('{"is_distilled": null}')
    assert recipe_of(tmp_path, "krea-2-raw") is RAW
    (tmp_path / "config.json").unlink()
    assert recipe_of(tmp_path, "krea-2-raw") is RAW
    assert "--recipe" in ask(tmp_path, "krea-2")


@pytest.mark.parametrize(
    ("metadata", "recipe"),
    [
        ({"is_distilled": "true"}, TURBO),
        ({"is_distilled": "False"}, RAW),
        ({"config": '{"is_distilled": true}'}, TURBO),
        ({"config": '{"is_distilled": false, "num_layers": 28}'}, RAW),
        ({"modelspec.title": "My Krea 2 Turbo, drawn"}, TURBO),
        ({"modelspec.architecture": "Krea-2-Raw"}, RAW),
        ({"general.name": "Krea 2 Raw"}, RAW),
        ({"name": "krea2_turbo_v3"}, TURBO),
        ({"is_distilled": "false", "modelspec.title": "Turbo"}, RAW),
    ],
)
def test_then_what_a_file_says_of_itself(tmp_path, metadata, recipe):
    name = "raw" if recipe else "turbo"
    assert recipe_of(a_file(tmp_path, **metadata), name) is recipe


@pytest.mark.parametrize(
    "metadata",
    [
        {"format": "pt"},
        {"config": "nf4"},
        {"config": "[1]"},
        {"config": "{}"},
        {"modelspec.architecture": "Krea-2"},
        {"modelspec.title": "Strawberry"},
        {"modelspec.title": "Turbo", "name": "raw"},
        {"modelspec.merged_from": "krea2_turbo, other"},
    ],
)
def test_metadata_that_says_nothing_leaves_it_to_the_name(tmp_path, metadata):
    file = a_file(tmp_path, **metadata)
    assert recipe_of(file, "krea2_raw") is RAW
    assert "--recipe" in ask(file, "krea2")


def test_a_transformer_in_place_of_the_indexs_speaks_first(tmp_path):
    silent, turbo = a_file(tmp_path, "a"), a_file(tmp_path, "b", is_distilled="true")
    assert recipe_of(turbo, replaced=True, is_distilled=False) is TURBO
    assert recipe_of(silent, "turbo", replaced=True, is_distilled=False) is TURBO
    assert recipe_of(silent, "fp8", replaced=True, is_distilled=False) is RAW


@pytest.mark.parametrize("value", ["yes", 1, [True]])
def test_a_field_that_is_neither_true_nor_false(tmp_path, value):
    file = a_file(tmp_path)
    assert ask(file, is_distilled=value) == (
        f"the model: model_index.json: is_distilled must be true or false, got {value!r}"
    )
    config = a_file(tmp_path, config=json.dumps({"is_distilled": value}))
    assert ask(config) == (
        f"{config}: its metadata: is_distilled must be true or false, got {value!r}"
    )
    (tmp_path / "config.json").write_text(json.dumps({"is_distilled": value}))
    assert ask(tmp_path).startswith(f"{tmp_path / 'config.json'}: is_distilled must be")


def test_a_text_that_is_neither_true_nor_false(tmp_path):
    file = a_file(tmp_path, is_distilled="perhaps")
    assert ask(file, "turbo") == (
        f"{file}: is_distilled of its metadata must be true or false, got 'perhaps'"
    )


@pytest.mark.parametrize("kept", [0, 4, 20])
def test_a_damaged_file_is_told(tmp_path, kept):
    file = a_file(tmp_path)
    file.write_bytes(file.read_bytes()[:kept])
    assert ask(file, "turbo").startswith(f"weight file {file} is damaged: ")


@pytest.mark.parametrize(
    ("fields", "recipe"),
    [
        ({"general.name": "Krea 2 Turbo"}, TURBO),
        ({"general.finetune": "raw", "general.name": "Krea 2"}, RAW),
        ({"is_distilled": "false", "general.name": "Krea 2 Turbo"}, RAW),
        ({}, TURBO),  # the file's name
    ],
)
def test_a_gguf_file_says_it_as_well(tmp_path, fields, recipe):
    file = tmp_path / "krea2-turbo-q8.gguf"
    writer = gguf.GGUFWriter(file, "krea2")
    for key, value in fields.items():
        writer.add_string(key, value)
    writer.add_tensor("first.weight", np.zeros(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert recipe_of(file, file.stem) is recipe


def test_a_damaged_gguf_file_is_told(tmp_path):
    (tmp_path / "krea2-turbo-q8.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"q8\.gguf is damaged: "):
        recipe_of(tmp_path / "krea2-turbo-q8.gguf", "krea2-turbo-q8")
