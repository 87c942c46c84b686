"""One set of factors for the demo checkpoint, and Diffusers' transformer with it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from krea2_srt.model.config import Krea2Config
from krea2_srt.model.dit_files import read_config
from tests.torch.lora.forms import Pairs, random_pairs
from tests.torch.lora.oracle import inputs, with_pairs


@pytest.fixture(scope="session")
def config(demo_model: Path) -> Krea2Config:
    return read_config(demo_model / "transformer")


@pytest.fixture(scope="session")
def pairs(config: Krea2Config) -> Pairs:
    return random_pairs(config)


@pytest.fixture(scope="session")
def diffusers_velocity(diffusers_pipeline) -> Callable[[Pairs], torch.Tensor]:
    """Diffusers' velocity of `inputs` with some factors, which PEFT applies."""

    def velocity(pairs: Pairs) -> torch.Tensor:
        transformer = diffusers_pipeline.transformer
        if pairs:
            transformer = with_pairs(transformer, pairs)
        return inputs().diffusers(diffusers_pipeline, transformer)

    return velocity
