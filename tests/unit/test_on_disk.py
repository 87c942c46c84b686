"""Which files are read ahead: those that will be loaded, found without torch and in silence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from krea2_srt.model.on_disk import part_files, weight_files

REPO = "krea/Krea-2-Turbo"
STEM = "diffusion_pytorch_model"


def write(file: Path, content: object = "") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def shards(folder: Path, stem: str, count: int = 2) -> list[Path]:
    names = [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    # In an order of its own.
    weight_map = {f"tensor.{i}": name for i, name in enumerate(reversed(names))}
    write(folder / f"{stem}.safetensors.index.json", {"weight_map": weight_map})
    return [write(folder / name) for name in names]


def released(folder: Path, class_name: str = "Krea2Pipeline") -> list[Path]:
    """A checkpoint in the released layout; its weight files in the order of loading."""
    write(folder / "model_index.json", {"_class_name": class_name})
    write(folder / "transformer/other.fp16.safetensors")
    return [
        *shards(folder / "transformer", STEM, 3),
        *shards(folder / "text_encoder", "model"),
        write(folder / f"vae/{STEM}.safetensors"),
    ]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The hub's cache, which holds nothing."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def in_cache(cache: Path, repo: str, revision: str = "main") -> Path:
    """The folder of a repo that is in the cache."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    write(folder / "refs" / revision, "c0ffee")
    return folder / "snapshots" / "c0ffee"


def test_parts_come_as_they_are_loaded(tmp_path):
    files = released(tmp_path / "krea")
    assert weight_files(str(tmp_path / "krea")) == files


def test_a_repo_is_found_in_the_cache(cache, monkeypatch):
    files = released(in_cache(cache, REPO))
    monkeypatch.delenv("OSS_TURBO", raising=False)
    assert weight_files(REPO) == weight_files("oss_turbo") == files
    assert weight_files(REPO, "other") == []


def test_a_revision_is_found_in_the_cache(cache):
    files = released(in_cache(cache, REPO, "v2"))
    assert weight_files(REPO, "v2") == files
    assert weight_files(REPO) == []


def test_the_original_codes_variable_names_a_checkpoint(tmp_path, monkeypatch):
    files = released(tmp_path / "krea")
    monkeypatch.setenv("OSS_RAW", str(tmp_path / "krea"))
    assert weight_files("oss_raw") == files


def test_a_single_file_goes_with_what_is_in_the_cache(cache, tmp_path):
    file = write(tmp_path / "turbo.safetensors")
    assert weight_files(str(file)) == [file]
    encoder = shards(in_cache(cache, "Qwen/Qwen3-VL-4B-Instruct"), "model")
    write(encoder[0].with_name("config.json"))
    vae = write(in_cache(cache, "Qwen/Qwen-Image") / f"vae/{STEM}.safetensors")
    write(vae.with_name("config.json"))
    assert weight_files(str(file)) == [file, *encoder, vae]


def test_parts_of_ones_own_take_the_place_of_the_checkpoints(tmp_path, cache):
    files = released(tmp_path / "krea")
    encoder, vae = write(tmp_path / "encoder.safetensors"), write(tmp_path / "vae.gguf")
    folder = str(tmp_path / "krea")
    assert weight_files(folder, text_encoder=str(encoder)) == [*files[:3], encoder, files[5]]
    assert weight_files(folder, vae=str(vae), text_encoder=None) == [*files[:5], vae]
    # A whole checkpoint for one part.
    others = released(tmp_path / "other")
    found = weight_files(folder, transformer=str(tmp_path / "other"))
    assert found == [*others[:3], *files[3:]]
    assert weight_files(folder, vae="nobody/nothing") == files[:5]


def test_a_part_may_be_a_link_to_a_file(tmp_path):
    files = released(tmp_path / "krea")
    links = tmp_path / "links"
    links.mkdir()
    write(links / "model_index.json", {"_class_name": "Krea2Pipeline"})
    file = write(tmp_path / "turbo.safetensors")
    (links / "transformer").symlink_to(file)
    (links / "text_encoder").symlink_to(tmp_path / "krea" / "text_encoder")
    found = weight_files(str(links))
    assert [each.resolve() for each in found] == [file, *files[3:5]]


def test_another_model_is_left_alone(tmp_path, cache):
    released(tmp_path / "flux", "FluxPipeline")
    assert weight_files(str(tmp_path / "flux")) == []
    assert weight_files(str(tmp_path)) == []


@pytest.mark.parametrize("name", ["", "nowhere", "../..", "a/b/c", "x" * 5000, "\0", "~nobody/x"])
def test_a_name_of_nothing_gives_nothing(name, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert weight_files(name) == []


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000, "\udcff"]
)
def test_a_broken_index_hides_only_its_own_part(tmp_path, index):
    files = released(tmp_path / "krea")
    file = tmp_path / "krea/transformer" / f"{STEM}.safetensors.index.json"
    file.write_text(index, errors="surrogateescape")
    assert weight_files(str(tmp_path / "krea")) == files[3:]


def test_an_index_leads_nowhere_else(tmp_path):
    folder = tmp_path / "krea" / "transformer"
    write(tmp_path / "secret.safetensors")
    names = {"a": "../../secret.safetensors", "b": 3, "c": "", "d": None}
    write(folder / f"{STEM}.safetensors.index.json", {"weight_map": names})
    assert part_files({"transformer": folder}) == []


def test_a_pipe_is_no_weight_file(tmp_path):
    os.mkfifo(tmp_path / f"{STEM}.safetensors")
    assert part_files({"transformer": tmp_path, "vae": tmp_path / f"{STEM}.safetensors"}) == []


BEGUN = """
import sys
from krea2_srt.model import on_disk
heavy = {"torch", "sglang", "transformers", "safetensors"}
def begin(files):
    print(*files, sorted(heavy & sys.modules.keys()))
    sys.exit(7)
on_disk.begin = begin
"""


@pytest.mark.parametrize(
    "call",
    [
        "from krea2_srt.cli.generate import main; main(['x', '--checkpoint', {folder!r}])",
        "from krea2_srt.sglang.worker import main; main(['--ready-fd', '1', '--parent-pid', '1', "
        "'--model-path', {folder!r}, '--port', '1'])",
    ],
    ids=["krea2-generate", "worker"],
)
def test_reading_begins_before_torch_and_sglang_are_imported(tmp_path, call):
    files = released(tmp_path / "krea")
    code = BEGUN + call.format(folder=str(tmp_path / "krea"))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout == " ".join(map(str, files)) + " []\n"
