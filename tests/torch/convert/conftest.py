from pathlib import Path

import pytest

from krea2_srt.convert.convert import Converted, convert_to_file, convert_to_folder
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.model.quantization import SERVED


@pytest.fixture(scope="session")
def checkpoint(demo_model: Path) -> Krea2Checkpoint:
    return Krea2Checkpoint.from_folder(demo_model)


@pytest.fixture(scope="session")
def fp8_folder(checkpoint: Krea2Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """The demo in 8 bits, in several weight files."""
    out = tmp_path_factory.mktemp("fp8") / "krea-2-demo-fp8"
    return convert_to_folder(checkpoint, out, SERVED["fp8"], shard_bytes=2 * 10**6)


@pytest.fixture(scope="session")
def fp8_file(checkpoint: Krea2Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """The demo's DiT in 8 bits, as one file."""
    out = tmp_path_factory.mktemp("fp8-file") / "fp8.safetensors"
    return convert_to_file(checkpoint.transformer, checkpoint.sampling, out, SERVED["fp8"])
