"""What is downloaded of a repo, and what is said when it cannot be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from krea2_srt.errors import CheckpointError
from krea2_srt.model.hub import find_checkpoint, released_folder
from tests.model_hub import COMMIT, REPO, ModelHub, contents


@pytest.fixture
def hub(model_hub: ModelHub) -> ModelHub:
    return model_hub


@pytest.fixture(scope="module")
def parts(demo_model: Path) -> dict[str, bytes]:
    return contents(demo_model)


@pytest.fixture(params=["find_checkpoint", "released_folder"])
def load(request):
    """Both ways in: of krea2-generate, and of SGLang's and ours server."""
    if request.param == "released_folder":
        return released_folder
    return lambda name: find_checkpoint(name).transformer.parent


def test_only_the_parts_are_downloaded_and_once(hub, parts, load):
    folder = load(REPO)
    assert sorted(hub.fetched) == sorted(parts)
    assert contents(folder) == parts
    assert load(REPO) == folder
    assert len(hub.fetched) == len(parts)


def test_what_is_whole_in_the_cache_needs_no_hub(hub, parts, monkeypatch):
    folder = released_folder(REPO)
    hub.status = 503
    assert released_folder(REPO) == folder
    assert find_checkpoint(REPO).transformer == folder / "transformer"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert released_folder(REPO) == folder


def test_the_whole_repo_is_not_in_the_cache(hub):
    """So whoever asks the client for all of it, as SGLang does, would download the rest."""
    released_folder(REPO)
    with pytest.raises(LocalEntryNotFoundError):
        snapshot_download(REPO, local_files_only=True)


def test_what_an_interrupted_download_lacks_is_fetched(hub, parts):
    folder = released_folder(REPO)
    missing = max(parts, key=lambda name: len(parts[name]))
    (folder / missing).resolve().unlink()
    (folder / missing).unlink()
    hub.fetched.clear()
    assert released_folder(REPO) == folder
    assert hub.fetched == [missing]
    assert contents(folder) == parts


def test_a_repo_that_has_only_been_asked_for_its_index(hub, parts):
    """As SGLang does before it starts its workers."""
    from huggingface_hub import hf_hub_download

    hf_hub_download(REPO, "model_index.json")
    folder = released_folder(REPO)
    assert sorted(hub.fetched) == sorted(parts)
    assert contents(folder) == parts


def test_a_revision(hub, parts):
    hub.commits["v2"] = "f" * 40
    assert released_folder(REPO, "v2").name == "f" * 40
    assert released_folder(REPO).name == COMMIT
    with pytest.raises(CheckpointError, match="has no revision v3"):
        released_folder(REPO, "v3")


@pytest.mark.parametrize("token", [None, "hf_stranger"])
def test_a_gated_repo(hub, load, token, monkeypatch):
    hub.gated = True
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(CheckpointError) as error:
        load(REPO)
    text = str(error.value)
    assert text.startswith(f"{REPO} is gated: accept its licence on {hub.url}/{REPO}")
    assert "hf auth login" in text
    assert "HF_TOKEN" in text
    assert "\n" not in text
    assert hub.fetched == []
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert load(REPO).is_dir()


def test_a_token_that_is_none(hub, load, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(CheckpointError, match=r"^[^\n]*does not know the token[^\n]*$"):
        load(REPO)


@pytest.mark.parametrize("token", [None, "hf_good"])
def test_a_repo_that_is_none(hub, load, token, monkeypatch):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(CheckpointError, match=r"^checkpoint krea/Krea-3 does not exist[^\n]*$"):
        load("krea/Krea-3")
    assert hub.refused
    hub.refused.clear()


def test_a_hub_that_fails(hub, load):
    hub.status = 403
    with pytest.raises(CheckpointError, match=r"^krea/[^\n]*status 403[^\n]*$"):
        load(REPO)


def test_no_network(hub, load, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"^krea/[^\n]*hub cannot be reached$"):
        load(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointError, match=r"^krea/[^\n]*cannot be reached \(HF_HUB_OFFLINE is set\)$"
    ):
        load(REPO)


@pytest.mark.slow
def test_krea2_generate_says_it_in_one_line_and_ends_with_2(hub, tmp_path):
    hub.gated = True
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    ended = subprocess.run(
        [sys.executable, "-m", "krea2_srt.cli.generate", "a fox", "--checkpoint", REPO],
        env={**_without_tokens(), **environment},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    lines = [line for line in ended.stderr.splitlines() if line.startswith("krea2-generate: error")]
    assert len(lines) == 1
    assert "is gated" in lines[0]
    assert "Traceback" not in ended.stderr


def _without_tokens() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
