"""The tokenizer of the package is written once, whole, and wherever that can be."""

from pathlib import Path

import pytest
import torch

from krea2_srt.errors import CheckpointError
from krea2_srt.model import qwen_tokenizer, tokenizer_files
from krea2_srt.model.hub import find_checkpoint
from krea2_srt.model.text_encoder import load_text_encoder
from krea2_srt.model.tokenizer_files import is_tokenizer, packaged_tokenizer
from tests.comparisons import CPU


@pytest.fixture
def written(monkeypatch, demo_model, tmp_path):
    """Folders that a tokenizer was written to: the demo's own, as making one takes long."""
    folders: list[Path] = []

    def write(folder: Path) -> None:
        folders.append(folder)
        for file in (demo_model / "tokenizer").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())

    monkeypatch.setattr(qwen_tokenizer, "write_tokenizer", write)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folders


def test_it_is_written_once(written, tmp_path):
    folder = packaged_tokenizer()
    assert folder.parent == tmp_path / "cache" / "krea2-srt"
    assert is_tokenizer(folder)
    assert packaged_tokenizer() == folder
    assert len(written) == 1
    assert list(folder.parent.iterdir()) == [folder]


def test_nothing_is_left_of_what_was_interrupted(monkeypatch, written, tmp_path):
    def interrupted(folder: Path) -> None:
        (folder / "vocab.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(qwen_tokenizer, "write_tokenizer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        packaged_tokenizer()
    assert list((tmp_path / "cache" / "krea2-srt").iterdir()) == []


def test_another_process_may_be_faster(monkeypatch, written, demo_model, tmp_path):
    write = qwen_tokenizer.write_tokenizer

    def write_beside_another(folder: Path) -> None:
        write(folder)
        if len(written) == 1:
            packaged_tokenizer()  # as the other one does, from begin to end

    monkeypatch.setattr(qwen_tokenizer, "write_tokenizer", write_beside_another)
    folder = packaged_tokenizer()
    assert len(written) == 2
    assert is_tokenizer(folder)
    assert list(folder.parent.iterdir()) == [folder]


def test_what_a_cleaner_of_old_files_has_left_is_written_anew(written):
    folder = packaged_tokenizer()
    (folder / "tokenizer.json").unlink()
    assert packaged_tokenizer() == folder
    assert is_tokenizer(folder)
    assert list(folder.parent.iterdir()) == [folder]


def test_other_users_may_read_it(written, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    assert packaged_tokenizer().stat().st_mode == plain.stat().st_mode


def test_a_cache_that_cannot_be_written(monkeypatch, written, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    ends = []
    monkeypatch.setattr(tokenizer_files.atexit, "register", lambda *call, **_: ends.append(call))
    folder = packaged_tokenizer()
    assert is_tokenizer(folder)
    for remove, *arguments in ends:
        remove(*arguments)
    assert not folder.exists()


def test_a_model_of_single_files_reads_prompts_with_it(
    written, original_file, demo_model, tmp_path
):
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    for file in (demo_model / "text_encoder").iterdir():
        (encoder / file.name).symlink_to(file)
    found = find_checkpoint(
        str(original_file), text_encoder=str(encoder), vae=str(demo_model / "vae")
    )
    assert found.tokenizer == packaged_tokenizer()
    assert len(written) == 1
    loaded = load_text_encoder(found.text_encoder, found.tokenizer, (2, 5), CPU, torch.float32)
    assert loaded.tokenize("a red fox")[0]


def test_a_folder_that_is_given_but_is_no_tokenizer(original_file, demo_model, tmp_path):
    found = find_checkpoint(
        str(original_file),
        text_encoder=str(demo_model / "text_encoder"),
        vae=str(demo_model / "vae"),
        tokenizer=str(tmp_path),
    )
    with pytest.raises(CheckpointError, match=rf"tokenizer in {tmp_path} cannot be read"):
        load_text_encoder(found.text_encoder, found.tokenizer, (2, 5), CPU, torch.float32)
