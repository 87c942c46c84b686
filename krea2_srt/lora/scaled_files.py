"""Adapters as they are typed: ``FILE`` or ``FILE:SCALE``."""

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from krea2_srt.errors import ConfigError, RequestError
from krea2_srt.request import check_scale


class ScaledFile(NamedTuple):
    """An adapter that is not read yet.

    Attributes:
        path: of its file or folder.
        scale: 1 is as it was trained.
        alpha: see `krea2_srt.lora.reader.read_adapter`.
    """

    path: Path
    scale: float = 1.0
    alpha: float | None = None


def is_there(path: Path) -> bool:
    """Whether there is something that can be looked at."""
    try:
        return path.exists()
    except OSError:  # a folder that nobody may look into, or a name that is too long
        return False


def is_folder(path: Path) -> bool:
    """Whether it is one that can be looked at."""
    return is_there(path) and path.is_dir()


def scaled_file(text: str) -> ScaledFile:
    """A file and its scale, which is 1 unless given; a colon that no number follows belongs to the
    name, as does one in the name of a file that is there.
    """
    path, colon, scale = text.rpartition(":")
    if colon and not is_there(Path(text)):
        with suppress(ValueError):
            return ScaledFile(Path(path), float(scale))
    return ScaledFile(Path(text))


def scaled_files(setting: str, text: str) -> tuple[ScaledFile, ...]:
    """Several, separated by commas; none of nothing.

    Args:
        setting: its name, for errors.
        text: its value.

    Raises:
        ConfigError: a scale is too large, or a part is empty.
    """
    found = []
    for part in text.split(",") if text.strip() else ():
        file = scaled_file(part.strip())
        if not part.strip():
            raise ConfigError(f"{setting}: must be FILE[:SCALE], or several separated by commas")
        try:
            check_scale(setting, file.path, file.scale)
        except RequestError as error:
            raise ConfigError(str(error)) from None
        found.append(file)
    return tuple(found)
