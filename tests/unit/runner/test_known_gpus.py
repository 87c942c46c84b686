"""GPUs by name."""

import pytest

from krea2_srt.errors import ConfigError
from krea2_srt.runner.known_gpus import KNOWN_GPUS, known_by_device_name, known_gpu


def test_each_is_found_by_its_name_however_it_is_written():
    for known in KNOWN_GPUS:
        assert known_gpu(known.name) is known
        assert known_gpu(f"NVIDIA {known.name.lower()} ") is known
    for written in ("GeForce RTX 4090", "rtx4090", "RTX-4090"):
        assert known_gpu(written).name == "4090"
    assert known_gpu("a100 40gb").name == "A100-40GB"
    assert known_gpu("A100").name == "A100-80GB"
    assert len({known.name for known in KNOWN_GPUS}) == len(KNOWN_GPUS)


def test_an_unknown_one_is_refused_with_those_that_are_known():
    with pytest.raises(ConfigError, match=r"^gpu: must be one of 3060, .*H200, got '3060 Ti'$"):
        known_gpu("3060 Ti")


@pytest.mark.parametrize(
    ("device_name", "name"),
    [
        ("NVIDIA GeForce RTX 3060", "3060"),
        ("NVIDIA RTX A6000", "A6000"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GeForce RTX 4080 SUPER", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A10G", None),
        ("NVIDIA H100 PCIe", None),
    ],
)
def test_devices_are_known_by_their_own_names(device_name, name):
    known = known_by_device_name(device_name)
    assert (known.name if known else None) == name


def test_what_is_known_of_them_can_be():
    for known in KNOWN_GPUS:
        assert 0 < known.gpu.free < known.gpu.total
        # fp8 from Ada on, 8 bits twice as fast as 16 or more.
        assert (known.fp8 > 0) is (known.capability >= (8, 9))
        assert known.int8 >= 1.99 * known.bf16
        assert known.rate("int8") == known.int8
        assert known.rate(None) == known.bf16
        # A picture's step is bound by arithmetic on all of them.
        assert 10e9 < known.pcie < known.bandwidth < known.bf16 / 50
