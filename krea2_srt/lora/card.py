"""What people say of an adapter: ``NAME.yaml`` beside its file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from krea2_srt.errors import AdapterError, RequestError
from krea2_srt.lora.keys import shown
from krea2_srt.request import check_scale
from krea2_srt.yaml_files import YamlFileError, read_yaml

_MAX_BYTES = 8192
_MAX_TEXT = 200
_MAX_WORDS = 32


@dataclass(frozen=True)
class AdapterCard:
    """All of it may be left away.

    Attributes:
        title: for people.
        trigger_words: that a prompt should hold, as its trainer's captions did.
        default_scale: where a request says none.
    """

    title: str = ""
    trigger_words: tuple[str, ...] = ()
    default_scale: float = 1.0


def read_card(file: Path) -> AdapterCard:
    """The card in a file; an empty one where there is no file.

    Raises:
        AdapterError: it cannot be read, or something in it is not understood.
    """
    try:
        if not file.exists():
            return AdapterCard()
        if not file.is_file():
            raise AdapterError(f"{file.name} is no file")
        if file.stat().st_size > _MAX_BYTES:
            raise AdapterError(f"{file.name} has more than {_MAX_BYTES} bytes")
        values = read_yaml(file)
    except YamlFileError as error:
        raise AdapterError(f"{file.name}: {error}") from None
    except OSError as error:
        raise AdapterError(f"{file.name}: {error.strerror}") from None
    if values is None:
        return AdapterCard()
    if not isinstance(values, dict):
        raise AdapterError(f"{file.name}: must hold fields, such as title: In sepia")
    for name in values:
        if name not in _READ:
            what = shown(repr(name)) if isinstance(name, str) else f"a {type(name).__name__}"
            raise AdapterError(f"{file.name}: {what} is not known; {', '.join(_READ)} are")
    try:
        return AdapterCard(**{name: _READ[name](value) for name, value in values.items()})
    except (RequestError, ValueError) as error:
        raise AdapterError(f"{file.name}: {error}") from None


def _title(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable() or len(value) > _MAX_TEXT:
        raise ValueError(f"title: must be one line of at most {_MAX_TEXT} characters")
    return value


def _trigger_words(value: Any) -> tuple[str, ...]:
    words = [value] if isinstance(value, str) else value
    if (
        not isinstance(words, list)
        or len(words) > _MAX_WORDS
        or not all(isinstance(w, str) and w.isprintable() and len(w) <= _MAX_TEXT for w in words)
    ):
        raise ValueError(f"trigger_words: must be a list of at most {_MAX_WORDS} texts")
    return tuple(words)


def _default_scale(value: Any) -> float:
    check_scale("default_scale", "the adapter", value)
    return float(value)


_READ: dict[str, Callable[[Any], Any]] = {
    "title": _title,
    "trigger_words": _trigger_words,
    "default_scale": _default_scale,
}
