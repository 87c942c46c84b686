"""What clients may call the model, and what it is called."""

from dataclasses import replace

import pytest

from krea2_server.model_names import ModelNames, name_of
from krea2_server.settings import Settings
from krea2_srt.testing.fake_engine import MODEL

RAW = replace(MODEL, path="/models/Krea-2-Raw/")
ELSEWHERE = {"engine_endpoints": ["tcp://host:5555"]}


@pytest.mark.parametrize(
    "name", ["Krea-2-Turbo", "KREA-2-TURBO", "krea/krea-2-turbo", "GPT-image-1"]
)
def test_names_of_the_model_are_known_in_any_case(name):
    fields = {"model_path": "krea/Krea-2-Turbo", "model_aliases": ["gpt-image-1"]}
    assert ModelNames.of(Settings(**fields), None).serves(name)
    to_the_letter = ModelNames.of(Settings(**fields, accept="openai"), None)
    assert not to_the_letter.serves("KREA-2-TURBO")
    assert not ModelNames.of(Settings(**fields), None).serves("dall-e-3")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("krea/Krea-2-Turbo", "krea-2-turbo"),
        ("/models/Krea-2-Raw/", "krea-2-raw"),
        ("/cache/hub/models--krea--Krea-2-Raw/snapshots/0123abcd", "krea-2-raw"),
        ("models--my-model/snapshots/0123abcd/", "my-model"),
        ("/models/Krea2_Turbo_fp8.safetensors", "krea2_turbo_fp8"),
        ("krea2-raw-Q8_0.gguf", "krea2-raw-q8_0"),
        ("", ""),
    ],
)
def test_a_model_is_called_by_the_last_part_of_its_path(path, name):
    assert name_of(path) == name


def test_engines_elsewhere_say_what_is_served_whatever_path_is_set():
    for fields in ({}, {"model_path": "krea/Krea-2-Turbo"}):
        names = ModelNames.of(Settings(**ELSEWHERE, **fields), RAW)
        assert names.listed == ["krea-2-raw"]
        assert names.serves("Krea-2-Raw")
        assert names.serves(RAW.path)
        assert not names.serves("krea-2-turbo")


def test_what_is_served_elsewhere_is_not_known_before_an_engine_has_said_it():
    names = ModelNames.of(Settings(**ELSEWHERE, model_aliases=["gpt-image-1", "*"]), None)
    assert (names.known, names.listed) == (False, ["gpt-image-1"])
    assert not ModelNames.of(Settings(**ELSEWHERE), None).serves("")


def test_a_name_that_is_set_is_the_models_everywhere():
    names = ModelNames.of(Settings(**ELSEWHERE, served_model_name="house"), RAW)
    assert (names.own, names.listed) == ("house", ["house"])
    assert names.serves("krea-2-raw")


def test_engines_of_our_own_serve_what_they_were_told_to():
    assert ModelNames.of(Settings(model_path="/models/a"), RAW).own == "a"
