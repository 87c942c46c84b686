"""What needs torch: Triton runs in its interpreter, Diffusers is what pictures are held to."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tests.torch.interpreted_triton  # noqa: F401 (before anything else that imports Triton)


@pytest.fixture(scope="session")
def load_diffusers() -> Callable:
    """Load `diffusers.Krea2Pipeline` from a folder, in a dtype."""

    def load(folder: Path, dtype: torch.dtype):
        from diffusers import Krea2Pipeline

        pipeline = Krea2Pipeline.from_pretrained(folder, dtype=dtype)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load


@pytest.fixture(scope="session")
def diffusers_pipeline(demo_model: Path, load_diffusers: Callable):
    return load_diffusers(demo_model, torch.float32)
