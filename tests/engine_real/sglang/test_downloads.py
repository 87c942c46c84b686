"""From a repo SGLang's commands download what the runner reads, and no more."""

import subprocess
from pathlib import Path

import pytest

from tests.engine_real.conftest import SGLANG, environment
from tests.model_hub import REPO, contents


@pytest.fixture
def arguments(model_hub):
    """SGLang's ``ServerArgs`` of `sglang generate` with the repo, as far as a pipeline reads it."""
    from types import SimpleNamespace

    parts = {"component_paths": {}, "component_weights_paths": {}}
    return SimpleNamespace(
        revision=None,
        model_subfolder=None,
        quantization=None,
        transformer_weights_path=None,
        **parts,
    )


@pytest.fixture
def supported(monkeypatch):
    """All that is asked for is served by us."""
    from krea2_srt.sglang import pipeline

    monkeypatch.setattr(pipeline, "unsupported_options", lambda server_args: [])
    monkeypatch.setattr(pipeline, "paged_by_sglang", lambda folder, server_args: [])
    return pipeline


def test_our_pipeline_downloads_the_parts(model_hub, demo_model, arguments, supported):
    supported.Krea2RunnerPipeline.__new__(supported.Krea2RunnerPipeline, REPO, arguments)
    parts = contents(demo_model)
    assert sorted(model_hub.fetched) == sorted(parts)
    assert contents(supported.local_folder(REPO, arguments)) == parts
    assert len(model_hub.fetched) == len(parts)


def test_a_revision(model_hub, arguments, supported):
    arguments.revision = "v2"
    model_hub.commits["v2"] = "f" * 40
    assert supported.local_folder(REPO, arguments).name == "f" * 40


def test_sglangs_own_pipeline_gets_the_same_files(
    model_hub, demo_model, arguments, supported, monkeypatch
):
    from sglang.multimodal_gen.runtime.utils.hf_diffusers_utils import maybe_download_model

    given = []
    monkeypatch.setattr(supported, "unsupported_options", lambda server_args: ["--lora-path"])
    monkeypatch.setattr(supported, "Krea2Pipeline", lambda path, *_: given.append(path))
    supported.Krea2RunnerPipeline.__new__(supported.Krea2RunnerPipeline, REPO, arguments)
    (folder,) = given
    # What it does with the path: nothing more is downloaded, and nothing is missing.
    assert maybe_download_model(folder, force_diffusers_model=True) == folder
    assert sorted(model_hub.fetched) == sorted(contents(demo_model))


@pytest.mark.parametrize("where", ["pipeline", "index"])
@pytest.mark.parametrize("why", ["is gated", "does not exist", "cannot be reached"])
def test_what_the_hub_refuses_is_one_line(
    model_hub, arguments, supported, monkeypatch, capsys, where, why
):
    from sglang.multimodal_gen.runtime.utils.hf_diffusers_utils import maybe_download_model_index

    from krea2_srt.sglang import model_index

    name = "krea/Krea-2-None" if why == "does not exist" else REPO
    model_hub.gated = why == "is gated"
    if why == "cannot be reached":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as ended:
        if where == "pipeline":
            supported.Krea2RunnerPipeline.__new__(supported.Krea2RunnerPipeline, name, arguments)
        else:
            model_index.read(maybe_download_model_index, name)
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "krea2-srt: error" in line]
    assert len(lines) == 1
    assert why in lines[0]
    assert model_hub.fetched == []
    model_hub.refused.clear()


def test_other_models_errors_are_sglangs(model_hub):
    from krea2_srt.sglang import model_index

    def refuse(name):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        model_index.read(refuse, "black-forest-labs/FLUX.1-dev")


@pytest.mark.slow
def test_sglang_generate_with_a_gated_repo(model_hub, tmp_path: Path):
    model_hub.gated = True
    home = {"HF_ENDPOINT": model_hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    ended = subprocess.run(
        [SGLANG, "generate", "--model-path", REPO, "--prompt", "a fox"],
        env={**{k: v for k, v in environment("on").items() if k != "HF_TOKEN"}, **home},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("krea2-srt: error: ") == 1
    assert "is gated" in ended.stderr
    assert model_hub.fetched == []
