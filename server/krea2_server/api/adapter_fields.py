"""Adapters as clients send them: a name, a name with its scale, objects with other keys."""

from collections.abc import Mapping
from typing import Any

from krea2_server.api.field_errors import FieldError
from krea2_server.api.spelling import number, shown

_NAMES = ("name", "lora_name", "model_name", "path", "lora", "model", "id")
_SCALES = ("scale", "weight", "strength", "multiplier", "lora_scale")
_ENDING = ".safetensors"


def adapters_of(field: str, value: Any) -> Any:
    """A list of ``{"name", "scale"}`` from what stands for one; what does not is returned as it is,
    and then refused.

    Args:
        field: as the client called it.

    Raises:
        FieldError: an object has no name, a key that is not known, or two for the same.
    """
    if isinstance(value, str):
        return [_of_text(part) for part in value.split(",")]
    if isinstance(value, Mapping):
        if value and not set(value) & set(_NAMES):
            # Scales by names.
            return [
                {"name": _plain(name), "scale": number("", scale)} for name, scale in value.items()
            ]
        return [_of_object(field, value)]
    if isinstance(value, list):
        return [_of_one(field, one) for one in value]
    return value


def _of_one(field: str, one: Any) -> Any:
    if isinstance(one, str):
        return _of_text(one)
    return _of_object(field, one) if isinstance(one, Mapping) else one


def _of_text(text: str) -> dict[str, Any]:
    name, colon, scale = text.strip().rpartition(":")
    if colon and isinstance(found := number("", scale), float):
        return {"name": _plain(name), "scale": found}
    return {"name": _plain(text.strip())}


def _of_object(field: str, one: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in one.items():
        ours = "name" if key in _NAMES else "scale" if key in _SCALES else None
        if ours is None:
            text = f"{field}: {shown(key)} is not known; name and scale are"
            raise FieldError(field, text, "unknown_parameter")
        if value is None:
            continue
        if ours in found:
            raise FieldError(field, f"{field}: has two keys for the {ours} of an adapter")
        found[ours] = _plain(value) if ours == "name" else number("", value)
    if "name" not in found:
        raise FieldError(field, f"{field}: each adapter needs its name", "missing_parameter")
    return found


def _plain(name: Any) -> Any:
    return name.removesuffix(_ENDING) if isinstance(name, str) else name
