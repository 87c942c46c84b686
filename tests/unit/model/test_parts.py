"""What a user names becomes the parts of a checkpoint, or one line says what to give."""

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from krea2_srt.errors import CheckpointError
from krea2_srt.model import tokenizer_files
from krea2_srt.model.parts import CheckpointSource, check_on_disk, find_parts, last_part
from krea2_srt.model.releases import TEXT_ENCODER_REPO, VAE_REPO

INDEX = {"_class_name": "Krea2Pipeline", "is_distilled": True}
PARTS = ("transformer", "text_encoder", "tokenizer", "vae")


def write(file: Path, **values: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values))
    return file.parent


def write_file(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"x": np.zeros(1, np.float32)}, file)
    return file


class Repos:
    """A hub: a repo is a folder, and all that is asked for is written down."""

    def __init__(self, **folders: Path) -> None:
        self.folders = {name.replace("__", "/"): folder for name, folder in folders.items()}
        self.asked: list[tuple[str, object]] = []

    def layout(self, repo: str, without: Collection[str]) -> Path:
        self.asked.append((repo, tuple(without)))
        return self.folders[repo]

    def component(self, repo: str, part: str) -> Path:
        self.asked.append((repo, part))
        return self.folders[repo]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in the released layout, without weights."""
    folder = tmp_path / "krea-2"
    write(folder / "model_index.json", **INDEX)
    write(folder / "scheduler" / "scheduler_config.json", max_shift=1.15)
    write(folder / "transformer" / "config.json", _class_name="Krea2Transformer2DModel")
    write(folder / "text_encoder" / "config.json", model_type="qwen3_vl")
    write(folder / "tokenizer" / "tokenizer.json")
    write(folder / "vae" / "config.json")
    return folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_file(tmp_path / "files" / "krea2_turbo_fp8.safetensors")


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setattr(tokenizer_files.importlib.util, "find_spec", lambda name: None)


def find(model: object, repos: Repos | None = None, **given: object):
    texts = {part: str(name) for part, name in given.items()}
    return find_parts(CheckpointSource(str(model), **texts), repos or Repos())


def refusal(model: object, repos: Repos | None = None, **given: object) -> str:
    with pytest.raises(CheckpointError) as error:
        find(model, repos, **given)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_has_its_own_parts(folder):
    found = find(folder)
    for part in PARTS:
        assert getattr(found, part) == folder / part
    assert (found.turbo, found.index, found.scheduler) == (True, INDEX, {"max_shift": 1.15})
    assert found.index_file == folder / "model_index.json"


def test_a_part_that_is_given_always_wins(folder, file, tmp_path):
    vae = write_file(tmp_path / "vae.safetensors")
    other = write(tmp_path / "other" / "tokenizer.json")
    found = find(folder, transformer=file, vae=vae, tokenizer=other, recipe="raw")
    assert (found.transformer, found.vae, found.tokenizer) == (file, vae, other)
    assert (found.text_encoder, found.turbo) == (folder / "text_encoder", False)
    assert found.index == INDEX


def test_a_single_file_gets_the_released_parts(file, folder, tmp_path):
    encoder = write(tmp_path / "qwen" / "config.json", model_type="qwen3_vl")
    write(encoder / "tokenizer.json")
    repos = Repos(Qwen__Qwen3_VL=encoder)
    repos.folders = {TEXT_ENCODER_REPO: encoder, VAE_REPO: folder}
    found = find(file, repos)
    assert (found.transformer, found.text_encoder, found.tokenizer) == (file, encoder, encoder)
    assert (found.vae, found.turbo, found.index) == (folder / "vae", True, {})
    assert sorted(repos.asked) == [(VAE_REPO, "vae"), (TEXT_ENCODER_REPO, "text_encoder")]


@pytest.mark.parametrize("form", ["folder", "layout", "file"])
def test_a_part_is_a_folder_or_a_checkpoint_with_it_or_a_file(file, folder, tmp_path, form):
    vae = {"folder": folder / "vae", "layout": folder, "file": write_file(tmp_path / "v.gguf")}
    found = find(file, text_encoder=folder / "text_encoder", vae=vae[form])
    assert found.vae == (vae["file"] if form == "file" else folder / "vae")
    found = find(file, text_encoder=folder, vae=folder)
    assert found.text_encoder == folder / "text_encoder"
    assert found.tokenizer == folder / "tokenizer"


def test_a_transformers_folder_alone_is_as_good_as_its_file(folder):
    parts = {"text_encoder": folder, "vae": folder, "recipe": "turbo"}
    found = find(folder / "transformer", **parts)
    assert (found.transformer, found.index) == (folder / "transformer", {})


def test_of_a_repo_the_parts_that_are_given_are_left_out(folder, file):
    repos = Repos(krea__Krea_2=folder)
    repos.folders["krea/Krea-2"] = folder
    find("krea/Krea-2", repos, transformer=file, vae=folder)
    assert repos.asked == [("krea/Krea-2", ("transformer", "vae"))]


@pytest.mark.parametrize(
    ("place", "found"),
    [
        ("files/tokenizer.json", "files"),
        ("files/tokenizer/tokenizer.json", "files/tokenizer"),
    ],
)
def test_the_tokenizer_beside_a_text_encoders_file(tmp_path, folder, file, place, found):
    encoder = write_file(tmp_path / "files" / "qwen3vl_4b.safetensors")
    write(tmp_path / place)
    given = {"text_encoder": encoder, "vae": folder}
    assert find(file, **given).tokenizer == tmp_path / found
    # It is the encoder's, so it comes before the checkpoint's own.
    assert find(folder, text_encoder=encoder).tokenizer == tmp_path / found
    assert find(folder).tokenizer == folder / "tokenizer"


def test_a_tokenizer_of_two_files(tmp_path, folder, file):
    encoder = write_file(tmp_path / "files" / "qwen3vl_4b.safetensors")
    write(tmp_path / "files" / "vocab.json")
    assert find(file, text_encoder=encoder, vae=folder).tokenizer is None
    write(tmp_path / "files" / "merges.txt")
    assert find(file, text_encoder=encoder, vae=folder).tokenizer == tmp_path / "files"


def test_without_a_tokenizer_it_is_the_packages(folder, file, tmp_path):
    encoder = write_file(tmp_path / "files" / "qwen3vl_4b.safetensors")
    assert find(file, text_encoder=encoder, vae=folder).tokenizer is None
    assert find(folder, text_encoder=encoder).tokenizer == folder / "tokenizer"


def test_without_the_package_either_it_is_asked_for(folder, file, tmp_path, no_package):
    encoder = write_file(tmp_path / "files" / "qwen3vl_4b.safetensors")
    assert refusal(file, text_encoder=encoder, vae=folder).startswith(
        f"there is no tokenizer beside {encoder}: give its folder as --tokenizer "
        "(--tokenizer-path of SGLang's commands), or uv pip install '.[demo]'"
    )
    shutil.rmtree(folder / "tokenizer")
    assert "give its folder as --tokenizer" in refusal(folder)


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (
            ["text_encoder"],
            "has no text_encoder/; give --text-encoder (--text-encoder-path of SGLang's commands)",
        ),
        (
            ["text_encoder", "vae"],
            "has no text_encoder/ and no vae/; give --text-encoder and --vae "
            "(--text-encoder-path and --vae-path of SGLang's commands)",
        ),
        (["transformer"], "has no transformer/"),
        (["scheduler"], "has no scheduler/"),
    ],
)
def test_a_folder_without_some_of_its_parts(folder, gone, said):
    for part in gone:
        shutil.rmtree(folder / part)
    assert refusal(folder) == f"checkpoint folder {folder} {said}"


def test_a_folder_without_some_of_its_parts_is_completed(folder, file):
    encoder = folder.parent / "encoder"
    (folder / "text_encoder").rename(encoder)
    shutil.rmtree(folder / "transformer")
    found = find(folder, text_encoder=encoder, transformer=file)
    assert (found.text_encoder, found.transformer) == (encoder, file)


def test_a_folder_that_says_nothing_is_not_raw(folder):
    write(folder / "model_index.json", _class_name="Krea2Pipeline")
    assert f"nothing says whether {folder} is Turbo or Raw: give --recipe" in refusal(folder)
    assert find(folder, recipe="turbo").turbo
    assert not find(folder, recipe="raw").turbo
    named = folder.rename(folder.parent / "my-krea-2-turbo")
    assert find(named).turbo


def test_a_folder_in_the_hubs_cache_goes_by_its_repo(folder, tmp_path):
    write(folder / "model_index.json", _class_name="Krea2Pipeline")
    snapshots = tmp_path / "models--krea--Krea-2-Raw" / "snapshots"
    snapshots.mkdir(parents=True)
    assert not find(folder.rename(snapshots / "0123abcd")).turbo


def test_a_recipe_that_is_given_always_wins(folder, file):
    assert not find(folder, recipe="raw").turbo
    assert not find(file, recipe="raw", text_encoder=folder, vae=folder).turbo
    assert refusal(folder, recipe="fast") == "recipe: must be turbo or raw, got 'fast'"


def test_a_transformer_of_another_checkpoint_is_what_that_one_says(folder, file, tmp_path):
    other = tmp_path / "mix"
    write(other / "model_index.json", _class_name="Krea2Pipeline", is_distilled=False)
    write(other / "transformer" / "config.json", _class_name="Krea2Transformer2DModel")
    for name in (other, other / "transformer"):
        assert find(folder).turbo
        assert not find(folder, transformer=name).turbo
    parts = {"text_encoder": folder, "vae": folder}
    assert not find(other / "transformer", **parts).turbo
    write(other / "model_index.json", _class_name="FluxPipeline", is_distilled=False)
    assert "--recipe" in refusal(other / "transformer", **parts)


@pytest.mark.parametrize(
    "name",
    [
        *("nothing", "./no/such", "/no/such", "~/no/such", "a/b/c", "a" * 999),
        *("models/krea2_turbo.safetensors", "models/krea2-Q8_0.gguf"),  # no repos
    ],
)
def test_a_name_that_is_nothing(name):
    assert refusal(name) == f"checkpoint {name} does not exist"


def test_names_of_parts_that_are_nothing(folder, tmp_path):
    for part in ("text_encoder", "vae", "transformer", "tokenizer"):
        flag = f"--{part.replace('_', '-')}"
        assert refusal(folder, **{part: "/no/such"}) == f"{flag}: /no/such does not exist"
    assert refusal(folder, vae="vae/wan.gguf") == "--vae: vae/wan.gguf does not exist"
    assert refusal(folder, tokenizer="some/repo") == "--tokenizer: some/repo does not exist"
    text = tmp_path / "notes.txt"
    text.write_text("x")
    no_part = f"{text} is neither a folder nor a .safetensors or .gguf file"
    assert refusal(folder, vae=text) == f"--vae: {no_part}"
    assert refusal(text) == f"checkpoint {no_part}"
    assert refusal(folder, tokenizer=text) == f"--tokenizer: {text} is no folder"


def test_a_pipe_is_no_part(folder, tmp_path):
    """Whoever opened it would wait."""
    pipe = tmp_path / "krea2_turbo.safetensors"
    os.mkfifo(pipe)
    no_part = f"{pipe} is neither a folder nor a .safetensors or .gguf file"
    assert refusal(pipe) == f"checkpoint {no_part}"
    assert refusal(folder, vae=pipe) == f"--vae: {no_part}"


def test_a_folder_that_is_no_checkpoint(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    missing = f"{empty} holds no checkpoint: {empty / 'model_index.json'} is missing"
    assert refusal(empty) == missing
    inside = write_file(empty / "krea2_turbo.safetensors")
    assert refusal(empty) == f"{missing}; name one of its files instead, {inside}"
    write(folder / "model_index.json", _class_name="FluxPipeline")
    assert "_class_name is 'FluxPipeline', expected 'Krea2Pipeline'" in refusal(folder)


def test_the_original_codes_names(folder, file, monkeypatch):
    parts = {"text_encoder": folder, "vae": folder}
    monkeypatch.setenv("OSS_RAW", str(file))
    assert not find("oss_raw", **parts).turbo
    repos = Repos()
    repos.folders["krea/Krea-2-Turbo"] = folder
    monkeypatch.delenv("OSS_TURBO", raising=False)
    assert find("oss_turbo", repos).transformer == folder / "transformer"


def test_what_can_be_told_without_a_hub(folder, file):
    check_on_disk(CheckpointSource("krea/Krea-2-Turbo"))
    check_on_disk(CheckpointSource(str(file)))
    check_on_disk(CheckpointSource(str(folder), vae="Qwen/Qwen-Image"))
    unnamed = file.rename(file.with_name("mix.safetensors"))
    for source, said in (
        (CheckpointSource(str(unnamed)), "--recipe"),
        (CheckpointSource("krea/Krea-2-Turbo", vae="/no/such"), "--vae: /no/such does not exist"),
        (CheckpointSource("/no/such"), "does not exist"),
    ):
        with pytest.raises(CheckpointError, match=said):
            check_on_disk(source)


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("krea/Krea-2-Turbo", "Krea-2-Turbo"),
        ("/models/krea-2/", "krea-2"),
        ("/x/krea2_turbo.fp8.safetensors", "krea2_turbo.fp8"),
        ("krea2-Q8_0.gguf", "krea2-Q8_0"),
        ("/hub/models--krea--Krea-2-Raw/snapshots/0123", "Krea-2-Raw"),
        ("/hub/models--Comfy-Org--Krea-2/snapshots/01/krea2_raw.safetensors", "krea2_raw"),
    ],
)
def test_what_a_model_is_called(name, last):
    assert last_part(name) == last
