"""How large an adapter may be: its file comes from anywhere."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of what is read.

    Attributes:
        file_bytes: of the file. A LoRA of rank 256 for all matrices of Krea 2 has 1.9 GB.
        header_bytes: of its header. Names take 0.2 MB; some trainers add the tags of all pictures.
        config_bytes: of PEFT's config.
        rank: of a factor.
    """

    file_bytes: int = 2 << 30
    header_bytes: int = 8 << 20
    config_bytes: int = 1 << 20
    rank: int = 512


DEFAULT_LIMITS = Limits()
