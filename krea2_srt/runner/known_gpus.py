"""GPUs that a plan can be made for without having one: what their makers say of them.

Rates are NVIDIA's data sheets' and architecture whitepapers', without sparsity: of bf16 and fp8
with sums in float32 (GeForce cards multiply twice as fast with sums in 16 bits, which loses
digits), of int8 with sums in int32. Memory is what CUDA reports where no screen is attached; ECC
takes its part of GDDR.
"""

from dataclasses import dataclass

from krea2_srt.errors import ConfigError
from krea2_srt.runner.gpu import Gpu
from krea2_srt.runner.memory_sizes import GIB

CONTEXT_GIB = 0.5
"""What a process that uses CUDA takes before any tensor: its context and modules."""

_PCIE_4, _PCIE_5 = 25e9, 50e9
"""Bytes a second of pinned copies over PCIe x16; 31.5 and 63 GB/s on the wire."""


@dataclass(frozen=True)
class KnownGpu:
    """A kind of GPU.

    Attributes:
        name: of it.
        memory_gib: as CUDA reports it.
        capability: compute capability.
        bf16, fp8, int8: operations a second of dense products; fp8 is 0 where there are none.
        bandwidth: of its memory, bytes a second.
        pcie: from pinned host memory, bytes a second.
    """

    name: str
    memory_gib: float
    capability: tuple[int, int]
    bf16: float
    fp8: float
    int8: float
    bandwidth: float
    pcie: float

    @property
    def gpu(self) -> Gpu:
        """As it is found where nothing else runs on it."""
        free = self.memory_gib - CONTEXT_GIB
        return Gpu(int(free * GIB), int(self.memory_gib * GIB), self.capability)

    def rate(self, format: str | None) -> float:
        """Operations a second of products in ``fp8`` or ``int8``; None is bf16."""
        return {None: self.bf16, "fp8": self.fp8, "int8": self.int8}[format]


KNOWN_GPUS = (
    # Ampere, GA10x: "NVIDIA Ampere GA102 GPU Architecture" for the 3090; the 3060 by its 112
    # tensor cores at 1.777 GHz. No fp8.
    KnownGpu("3060", 11.75, (8, 6), 25.5e12, 0, 102e12, 360e9, _PCIE_4),
    KnownGpu("3090", 23.69, (8, 6), 71e12, 0, 284e12, 936e9, _PCIE_4),
    KnownGpu("A10", 22.19, (8, 6), 125e12, 0, 250e12, 600e9, _PCIE_4),
    KnownGpu("A6000", 47.5, (8, 6), 155e12, 0, 310e12, 768e9, _PCIE_4),
    # Ada: "NVIDIA Ada GPU Architecture" for the 4080 and 4090; the 4070 by its 184 tensor cores at
    # 2.475 GHz; data sheets of L4 (72 W: it holds these rates for moments only) and L40S.
    KnownGpu("4070", 11.72, (8, 9), 58.3e12, 116.6e12, 233e12, 504e9, _PCIE_4),
    KnownGpu("4080", 15.7, (8, 9), 97.5e12, 195e12, 390e12, 717e9, _PCIE_4),
    KnownGpu("4090", 23.64, (8, 9), 165e12, 330e12, 661e12, 1008e9, _PCIE_4),
    KnownGpu("L4", 22.03, (8, 9), 121e12, 242e12, 242e12, 300e9, _PCIE_4),
    KnownGpu("L40S", 44.4, (8, 9), 362e12, 733e12, 733e12, 864e9, _PCIE_4),
    # Blackwell: "NVIDIA RTX Blackwell GPU Architecture"; the data sheet of HGX B200, an eighth.
    KnownGpu("5080", 15.5, (12, 0), 112.6e12, 225e12, 450e12, 960e9, _PCIE_5),
    KnownGpu("5090", 31.37, (12, 0), 209.5e12, 419e12, 838e12, 1792e9, _PCIE_5),
    KnownGpu("B200", 178.35, (10, 0), 2250e12, 4500e12, 4500e12, 7.67e12, _PCIE_5),
    # Data sheets of the A100, H100 and H200, SXM.
    KnownGpu("A100-40GB", 39.4, (8, 0), 312e12, 0, 624e12, 1555e9, _PCIE_4),
    KnownGpu("A100-80GB", 79.2, (8, 0), 312e12, 0, 624e12, 2039e9, _PCIE_4),
    KnownGpu("H100", 79.1, (9, 0), 989e12, 1979e12, 1979e12, 3350e9, _PCIE_5),
    KnownGpu("H200", 139.8, (9, 0), 989e12, 1979e12, 1979e12, 4800e9, _PCIE_5),
)

_OTHER_NAMES = {
    "3060-12GB": "3060",
    "3090-24GB": "3090",
    "4070-12GB": "4070",
    "4080-16GB": "4080",
    "4090-24GB": "4090",
    "5080-16GB": "5080",
    "5090-32GB": "5090",
    "A100": "A100-80GB",
    "H100-80GB": "H100",
}


_VARIANTS = {"D", "LAPTOP", "NVL", "PCIE", "SUPER", "TI"}
"""Words in the names of devices with other rates."""


def known_gpu(name: str) -> KnownGpu:
    """A GPU by its name, as in "4090", "RTX 4090", "rtx4090" or "a100-40gb".

    Raises:
        ConfigError: it is not known, and which are.
    """
    plain = "-".join(name.upper().replace("-", " ").split())
    for maker in ("NVIDIA", "GEFORCE", "RTX"):
        plain = plain.removeprefix(maker).removeprefix("-")
    plain = _OTHER_NAMES.get(plain, plain)
    for known in KNOWN_GPUS:
        if known.name == plain:
            return known
    names = ", ".join(known.name for known in KNOWN_GPUS)
    raise ConfigError(f"gpu: must be one of {names}, got {name!r}")


def known_by_device_name(device_name: str) -> KnownGpu | None:
    """The same by CUDA's name of a device, "NVIDIA GeForce RTX 4090"; None if it is not known."""
    words = set(device_name.upper().replace("-", " ").split())
    fits = [known for known in KNOWN_GPUS if set(known.name.upper().split("-")) <= words]
    # "RTX 4080 SUPER" and "H100 NVL" are other GPUs than those of the table.
    return fits[0] if len(fits) == 1 and not _VARIANTS & words else None
