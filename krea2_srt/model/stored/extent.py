"""Where tensors lie in a safetensors file."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Extent:
    """A file from its beginning to the end of a tensor.

    Attributes:
        file: that holds the tensor.
        end: bytes before its end.
    """

    file: Path
    end: int


def extents(file: Path) -> dict[str, Extent]:
    """Extents of the tensors of a file whose header is known to be sound, by name.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return {n: Extent(file, 8 + length + each["data_offsets"][1]) for n, each in header.items()}
