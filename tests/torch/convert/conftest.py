from pathlib import Path

import pytest

from krea2_srt.convert.convert import Converted, convert_to_file, convert_to_folder
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.model.quantization import SERVED, Quantization


@pytest.fixture(scope="session")
def checkpoint(demo_model: Path) -> Krea2Checkpoint:
    return Krea2Checkpoint.from_folder(demo_model)


@pytest.fixture(scope="session", params=SERVED)
def eight_bits(request: pytest.FixtureRequest) -> Quantization:
    """Each quantization that can be asked for."""
    return SERVED[request.param]


@pytest.fixture(scope="session")
def eight_bit_folder(
    checkpoint: Krea2Checkpoint,
    eight_bits: Quantization,
    tmp_path_factory: pytest.TempPathFactory,
) -> Converted:
    """The demo in 8 bits, in several weight files."""
    out = tmp_path_factory.mktemp("folder") / f"krea-2-demo-{eight_bits.format}"
    return convert_to_folder(checkpoint, out, eight_bits, shard_bytes=2 * 10**6)


@pytest.fixture(scope="session")
def eight_bit_file(
    checkpoint: Krea2Checkpoint,
    eight_bits: Quantization,
    tmp_path_factory: pytest.TempPathFactory,
) -> Converted:
    """The demo's DiT in 8 bits, as one file."""
    out = tmp_path_factory.mktemp("file") / f"{eight_bits.format}.safetensors"
    return convert_to_file(checkpoint.transformer, checkpoint.sampling, out, eight_bits)
