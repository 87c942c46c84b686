"""Shared by all tests: demo checkpoints, runner, Diffusers pipeline and server, one per run."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# Nothing in the tests may reach for the network, whatever a library would like to look up.
os.environ["HF_HUB_OFFLINE"] = "1"

import tests.interpreted_triton  # noqa: F401 (first)
from krea2_srt.demo.checkpoint import write_demo_checkpoint, write_original_file
from krea2_srt.demo.random_weights import RandomWeights
from krea2_srt.demo.trained_weights import TrainedWeights
from krea2_srt.runner.checkpoint import Krea2Checkpoint
from krea2_srt.runner.model_runner import Krea2Runner
from tests.model_hub import BESIDE, REPO, ModelHub, contents

CPU = torch.device("cpu")
PROMPT = "a red fox sitting in fresh snow, golden hour, photorealistic"


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint, random, Turbo. Its name holds "krea-2", which SGLang goes by."""
    folder = tmp_path_factory.mktemp("models") / "krea-2-demo"
    write_demo_checkpoint(folder, RandomWeights())
    return folder


@pytest.fixture(scope="session")
def trained_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint, trained: it draws what it is asked for."""
    folder = tmp_path_factory.mktemp("trained") / "krea-2-demo"
    write_demo_checkpoint(folder, TrainedWeights())
    return folder


@pytest.fixture(scope="session")
def raw_demo_model(demo_model: Path) -> Path:
    """The same weights marked as Raw."""
    folder = demo_model.parent / "krea-2-raw-demo"
    clone_checkpoint(demo_model, folder, is_distilled=False)
    return folder


@pytest.fixture(scope="session")
def original_file(demo_model: Path) -> Path:
    """The transformer as a single file with the original names."""
    file = demo_model.parent / "turbo.safetensors"
    write_original_file(demo_model / "transformer", file)
    return file


@pytest.fixture
def model_hub(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModelHub]:
    """A hub with Krea 2's repo, which this process takes for the real one, and an empty cache."""
    from huggingface_hub import constants

    with ModelHub(REPO, contents(demo_model) | BESIDE).serving() as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub
        assert hub.refused == []


@pytest.fixture(scope="session")
def runner(demo_model: Path) -> Krea2Runner:
    return Krea2Runner.load(Krea2Checkpoint.from_folder(demo_model), CPU, torch.float32)


@pytest.fixture(scope="session")
def load_diffusers() -> Callable:
    """Load `diffusers.Krea2Pipeline` from a folder, in a dtype."""

    def load(folder: Path, dtype: torch.dtype):
        from diffusers import Krea2Pipeline

        pipeline = Krea2Pipeline.from_pretrained(folder, torch_dtype=dtype)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load


@pytest.fixture(scope="session")
def diffusers_pipeline(demo_model: Path, load_diffusers: Callable):
    return load_diffusers(demo_model, torch.float32)


@pytest.fixture(scope="session")
def real_server(trained_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """krea2-serve with the real engine and the trained demo, in float32; a `Served`."""
    from tests.server.serving import serve

    precisions = ("dit-precision", "vae-precision", "text-encoder-precisions")
    float32 = " ".join(f"--{name} fp32" for name in precisions)
    flags = ["--model-path", str(trained_model), f"--sglang-args={float32}"]
    # On a busy machine everything is estimated to take long; refusals have tests of their own.
    flags += ["--engine.max-queue-s", "2000", "--engine.turn-log", "turns.jsonl"]
    with serve(tmp_path_factory.mktemp("real-server"), *flags, timeout_s=300) as running:
        yield running


def clone_checkpoint(source: Path, target: Path, **index: object) -> None:
    """A checkpoint whose parts are links to another's, with changes to its model_index.json."""
    target.mkdir()
    for part in source.iterdir():
        if part.is_dir():
            (target / part.name).symlink_to(part)
    values = json.loads((source / "model_index.json").read_text()) | index
    (target / "model_index.json").write_text(json.dumps(values))


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """|got - expected| / |expected| in the 2-norm, in float64."""
    difference = torch.linalg.vector_norm(got.double() - expected.double())
    return (difference / torch.linalg.vector_norm(expected.double())).item()


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [0, 1]."""
    assert a.shape == b.shape
    return -10 * torch.log10((a.double() - b.double()).square().mean()).item()
