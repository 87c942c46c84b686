"""Adapters as they are typed."""

from pathlib import Path

import pytest

from krea2_srt.errors import ConfigError
from krea2_srt.lora.scaled_files import ScaledFile, scaled_file, scaled_files


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        ("a.safetensors:-2", "a.safetensors", -2.0),
        ("a:b", "a:b", 1.0),
        ("a:b:0", "a:b", 0.0),
        ("a:", "a:", 1.0),
    ],
)
def test_a_scale_is_what_follows_the_last_colon(text, path, scale):
    assert scaled_file(text) == ScaledFile(Path(path), scale)


def test_a_file_that_is_there_keeps_its_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run:2").touch()
    assert scaled_file("run:2") == ScaledFile(Path("run:2"))
    assert scaled_file("run:2:0.5") == ScaledFile(Path("run:2"), 0.5)


def test_several_are_separated_by_commas():
    assert scaled_files("lora_merge", "") == scaled_files("lora_merge", " ") == ()
    found = scaled_files("lora_merge", "a:0.5, b")
    assert found == (ScaledFile(Path("a"), 0.5), ScaledFile(Path("b")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,,b", "lora_merge: must be FILE[:SCALE], or several separated by commas"),
        ("a:nan", "lora_merge: the scale of a must be a finite number, got nan"),
        ("a,b:11", "lora_merge: the scale of b must be between -10 and 10, got 11"),
    ],
)
def test_what_is_wrong_is_named(text, message):
    with pytest.raises(ConfigError) as caught:
        scaled_files("lora_merge", text)
    assert str(caught.value) == message
