"""The checkpoint that krea2-serve names is checked before anything starts, and reaches SGLang."""

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from krea2_server.cli import _check_model
from krea2_server.engine.supervisor import worker_command, worker_environment
from krea2_server.settings import load_settings
from krea2_srt.environment import read_environment
from krea2_srt.errors import CheckpointError, ConfigError


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for variable in os.environ:
        if variable.startswith("KREA2_"):
            monkeypatch.delenv(variable)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "krea2_mix.safetensors"
    save_file({"x": np.zeros(1, np.float32)}, file)
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "part"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    return folder


def refusal(*flags: object) -> str:
    with pytest.raises((CheckpointError, ConfigError)) as error:
        _check_model(load_settings([str(flag) for flag in flags]))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_all_parts_reach_sglang(file, folder):
    parts = ["--text-encoder", file, "--vae", folder, "--tokenizer", folder, "--recipe", "raw"]
    settings = load_settings([*map(str, ["--model-path", file, *parts])])
    _check_model(settings)
    command = worker_command(settings, 3)
    assert command[command.index("--model-path") + 1] == str(file)
    assert command[command.index("--pipeline-class-name") + 1] == "Krea2Pipeline"
    assert f"--text-encoder-path={file}" in command
    assert f"--vae-path={folder}" in command
    assert f"--tokenizer-path={folder}" in command
    assert read_environment(worker_environment(settings, 0)).runner.recipe == "raw"


def test_without_parts_sglang_is_told_of_none(folder):
    command = worker_command(load_settings([]), 3)
    assert not [option for option in command if option.endswith("-path") or "-path=" in option][1:]
    assert "KREA2_SRT_RECIPE" not in worker_environment(load_settings([]), 0)


def test_a_home_is_found_by_who_has_one(monkeypatch, tmp_path, file):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = load_settings(["--model-path", f"~/{file.name}", "--recipe", "turbo"])
    _check_model(settings)
    assert str(file) in worker_command(settings, 3)


def test_what_is_wrong_is_told_by_the_flag_to_give(file, folder, monkeypatch):
    assert "Turbo or Raw: give --recipe turbo or --recipe raw" in refusal("--model-path", file)
    monkeypatch.setenv("KREA2_SRT_RECIPE", "turbo")
    _check_model(load_settings(["--model-path", str(file)]))
    monkeypatch.delenv("KREA2_SRT_RECIPE")
    recipe = ["--recipe", "turbo", "--model-path"]
    assert refusal(*recipe, "/no/such") == "checkpoint /no/such does not exist"
    assert refusal(*recipe, folder).startswith(f"{folder} holds no checkpoint")
    assert refusal(*recipe, file, "--vae", "/no") == "--vae: /no does not exist"
    assert refusal(*recipe, file, "--tokenizer", file) == f"--tokenizer: {file} is no folder"


@pytest.mark.parametrize("flag", ["recipe", "text-encoder", "vae", "tokenizer"])
def test_engines_that_others_start_have_their_own(flag):
    endpoints = ["--engine-endpoints", "tcp://127.0.0.1:5555"]
    said = f"^{flag.replace('-', '_')}: has no effect with engine_endpoints"
    with pytest.raises(ConfigError, match=said):
        load_settings([*endpoints, f"--{flag}", "raw" if flag == "recipe" else "x"])


def test_a_recipe_under_two_names():
    with pytest.raises(ConfigError, match=r"^recipe: has no effect with runner\.recipe"):
        load_settings(["--recipe", "raw", "--runner.recipe", "turbo"])
    assert load_settings(["--runner.recipe", "raw"]).source.recipe == "raw"
