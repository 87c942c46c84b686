"""Shared by all tiers: the demo checkpoints, the runner and the real engine, one each per run.

A tier's folder says what its tests need: ``unit`` no torch, ``torch``, ``server`` (on an engine
that does as told), ``engine_real`` (SGLang, on CPU), ``e2e`` (several engines, Ray, minutes) and
``bench``. What is not needed is not imported here.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from tests.model_hub import BESIDE, REPO, ModelHub, contents

if TYPE_CHECKING:
    import torch

    from krea2_srt.runner.model_runner import Krea2Runner

# Nothing in the tests may reach for the network, whatever a library would like to look up.
os.environ["HF_HUB_OFFLINE"] = "1"
# Two tests at a time on two cores: threads that spin take the core from what they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if tests_at_a_time := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # Each has a core or more to itself: with more threads than that an engine waits, at every
    # operation, for the one of its threads whose core another test has.
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // tests_at_a_time)))
# Every process would compile SGLang's and torch's thousands of modules anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

pytest_plugins = ["tests.browser", "tests.clients"]

TIERS = ("e2e", "engine_real", "torch", "server", "bench", "unit")
"""As they start: the longest first, so that no core waits in the end."""

PROCESSES = {
    f"tests/e2e/test_{name}.py"
    for name in ("bytecode", "drills", "ray_cluster", "restricted", "wheel")
}
"""Files that import no SGLang and use no engine of the run: they only start processes."""

PROFILES = {"dev": 40, "ci": 150, "nightly": 3000}
"""Examples of a property. HYPOTHESIS_PROFILE names one; CI runs more of them than a developer."""

for _name, _examples in PROFILES.items():
    settings.register_profile(_name, max_examples=_examples, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: TIERS.index(item.nodeid.split("/")[1]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files are what is handed out; all that needs SGLang is one piece, for one import and engine,
    and what only starts processes, drills and Ray's, is another.

    Not by xdist_group: pytest-xdist 3.8 puts it where pytest 9.2 does not look.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            if file in PROCESSES:
                return "processes"
            return "engine" if file.split("/")[1] in ("engine_real", "e2e") else file

    return ByFile(config, log)


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint, random, Turbo. Its name holds "krea-2", which SGLang goes by."""
    from krea2_srt.demo.checkpoint import write_demo_checkpoint
    from krea2_srt.demo.random_weights import RandomWeights

    folder = tmp_path_factory.mktemp("models") / "krea-2-demo"
    write_demo_checkpoint(folder, RandomWeights())
    return folder


@pytest.fixture(scope="session")
def trained_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint, trained: it draws what it is asked for."""
    from krea2_srt.demo.checkpoint import write_demo_checkpoint
    from krea2_srt.demo.trained_weights import TrainedWeights

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
    from krea2_srt.demo.checkpoint import write_original_file

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
def runner(demo_model: Path) -> "Krea2Runner":
    import torch

    from krea2_srt.model.checkpoint import Krea2Checkpoint
    from krea2_srt.runner.model_runner import Krea2Runner

    checkpoint = Krea2Checkpoint.from_folder(demo_model)
    return Krea2Runner.load(checkpoint, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def load_diffusers() -> Callable:
    """Load `diffusers.Krea2Pipeline` from a folder, in a dtype."""

    def load(folder: Path, dtype: "torch.dtype"):
        from diffusers import Krea2Pipeline

        pipeline = Krea2Pipeline.from_pretrained(folder, dtype=dtype)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load


@pytest.fixture(scope="session")
def diffusers_pipeline(demo_model: Path, load_diffusers: Callable):
    import torch

    return load_diffusers(demo_model, torch.float32)


def clone_checkpoint(source: Path, target: Path, **index: object) -> None:
    """A checkpoint whose parts are links to another's, with changes to its model_index.json."""
    target.mkdir()
    for part in source.iterdir():
        if part.is_dir():
            (target / part.name).symlink_to(part)
    values = json.loads((source / "model_index.json").read_text()) | index
    (target / "model_index.json").write_text(json.dumps(values))
