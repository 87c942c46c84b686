"""Which file a name is, in a folder of adapters."""

import os
import re
from pathlib import Path

import pytest

from krea2_srt.errors import AdapterError
from krea2_srt.lora.files import adapter_names, find_adapter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    folder.mkdir()
    (folder / "sepia.safetensors").touch()
    peft = folder / "ink-v1.2"
    peft.mkdir()
    (peft / "adapter_model.safetensors").touch()
    (peft / "adapter_config.json").touch()
    (tmp_path / "secret.safetensors").touch()
    (tmp_path / "secret.json").touch()
    return folder


def test_a_name_is_a_file_or_a_folder_of_peft(folder):
    assert find_adapter(folder, "sepia") == folder / "sepia.safetensors"
    assert find_adapter(folder, "ink-v1.2") == folder / "ink-v1.2"


def test_a_folder_of_adapters_comes_before_their_names(folder):
    (folder / "acme").mkdir()
    (folder / "acme" / "My Ink (v2) größer.safetensors").touch()
    (folder / "ink-v1.2").rename(folder / "acme" / "peft")
    for name in ("acme/My Ink (v2) größer", "acme/peft", "sepia"):
        assert find_adapter(folder, name).exists()
    assert adapter_names(folder) == ["acme/My Ink (v2) größer", "acme/peft", "sepia"]


def test_what_is_no_adapter_is_not_listed(folder):
    for name in ("notes.txt", ".hidden.safetensors", "a:1.safetensors", "sepia.yaml"):
        (folder / name).touch()
    (folder / "deep" / "deeper").mkdir(parents=True)
    (folder / "deep" / "deeper" / "x.safetensors").touch()
    assert adapter_names(folder) == ["ink-v1.2", "sepia"]


def test_a_folder_may_be_a_link_and_have_links_within(folder, tmp_path):
    (folder / "brown.safetensors").symlink_to("sepia.safetensors")
    (tmp_path / "link").symlink_to(folder)
    assert find_adapter(tmp_path / "link", "brown") == tmp_path / "link" / "brown.safetensors"


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../secret",
        "/etc/passwd",
        "a/b/c",
        "/a",
        "a/",
        "acme/../sepia",
        "a\\b",
        ".hidden",
        "x" * 128,
        "a ",
        "a.",
        "a:1",
        "<a>",
        "a\n",
        "a\0",
    ],
)
def test_a_name_that_is_none_is_refused_before_the_disk_is_asked(name, folder):
    with pytest.raises(AdapterError, match="names are 1 to 127 letters, digits") as caught:
        find_adapter(folder, name)
    assert str(caught.value).isprintable()


def test_what_is_not_there_is_said(folder):
    with pytest.raises(AdapterError, match=r"adapter nope: there is none$"):
        find_adapter(folder, "nope")
    with pytest.raises(AdapterError, match=r"adapter nope: there is none$"):
        find_adapter(folder / "nowhere", "nope")


def test_a_file_has_one_name(folder):
    (folder / "notes.txt").touch()
    for name in ("sepia.safetensors", "notes.txt"):
        with pytest.raises(AdapterError, match=f"adapter {re.escape(name)}: there is none$"):
            find_adapter(folder, name)


def test_two_of_one_name_are_refused(folder):
    (folder / "ink-v1.2.safetensors").touch()
    with pytest.raises(AdapterError, match=r"ink-v1\.2\.safetensors and the folder ink-v1\.2 are"):
        find_adapter(folder, "ink-v1.2")


def test_a_link_out_of_the_folder_is_refused(folder):
    (folder / "out.safetensors").symlink_to("../secret.safetensors")
    with pytest.raises(AdapterError, match=r"adapter out: out\.safetensors is a link that leads"):
        find_adapter(folder, "out")


def test_a_folder_that_is_a_link_out_is_refused(folder, tmp_path):
    (folder / "ink-v1.2").rename(tmp_path / "ink")
    (folder / "ink").symlink_to("../ink")
    with pytest.raises(AdapterError, match=r"adapter ink: adapter_model\.safetensors is a link"):
        find_adapter(folder, "ink")


@pytest.mark.parametrize("part", ["adapter_model.safetensors", "adapter_config.json"])
def test_no_part_of_a_folder_may_lead_out(part, folder):
    (folder / "ink-v1.2" / part).unlink()
    (folder / "ink-v1.2" / part).symlink_to(f"../../secret{Path(part).suffix}")
    with pytest.raises(AdapterError, match=rf"adapter ink-v1\.2: {part} is a link that leads out"):
        find_adapter(folder, "ink-v1.2")


def test_a_folder_that_cannot_be_looked_into_is_one_line(tmp_path):
    with pytest.raises(AdapterError, match="adapter a: it cannot be read: File name too long"):
        find_adapter(tmp_path / ("x" * 300), "a")


def test_neither_a_broken_link_nor_a_pipe_is_an_adapter(folder):
    (folder / "gone.safetensors").symlink_to("nowhere.safetensors")
    os.mkfifo(folder / "pipe.safetensors")
    with pytest.raises(AdapterError, match=r"adapter gone: there is none$"):
        find_adapter(folder, "gone")
    with pytest.raises(AdapterError, match="adapter pipe: this is no file"):
        find_adapter(folder, "pipe")
