"""The body of txt2img, read as the request that it stands for."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from krea2_server.a1111.fields import ASK_NOTHING, NO_EFFECT, OPTIONS_NO_EFFECT, REFUSED
from krea2_server.api.lenient import request_model
from krea2_server.api.schemas import ImageGenerationRequest
from krea2_server.api.spelling import flag, lower, printable, shown, whole
from krea2_server.errors import invalid

OVERRIDES = "override_settings"
_COUNTS = ("batch_size", "n_iter")
_OWN = {OVERRIDES, "send_images", *_COUNTS}
"""Fields that have a function of their own here."""

MAX_WARNINGS = 32
"""Words on options; an object may hold a hundred thousand."""

_ADAPTER = re.compile(r"<(?:lora|lyco|hypernet):[^<>]{0,200}>", re.IGNORECASE)
_WEIGHT = re.compile(r"\([^()]{1,500}:\s*[0-9.]{1,8}\s*\)|\[[^\[\]]{0,500}:\s*[0-9.]{1,8}\s*\]")


@dataclass
class Txt2Img:
    """What a front end has asked for.

    Attributes:
        request: in our words, with warnings of what had no effect.
        checkpoint: the model that it names, if it names one.
        send_images: whether it wants to see the images.
    """

    request: ImageGenerationRequest
    checkpoint: str | None = None
    send_images: bool = True


@dataclass
class _Body:
    """The body so far: fields that `api.dialects` knows, and what was said of the others."""

    fields: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def warn(self, name: str, why: str) -> None:
        if len(self.warnings) < MAX_WARNINGS:
            self.warnings.append(f"{name}: has no effect; {why}")


def read_txt2img(values: Mapping[str, Any], max_n: int) -> Txt2Img:
    """Read a body.

    Args:
        values: the client's.
        max_n: images that one request may ask for.

    Raises:
        ApiError: 400, naming the field.
        RequestValidationError: the same, of a field that `ImageGenerationRequest` refuses.
    """
    body = _Body()
    for name, value in values.items():
        if value is None or name in _OWN or name in ASK_NOTHING:
            continue
        if name in REFUSED:
            _refuse(name, value)
        elif (row := NO_EFFECT.get(name)) is not None:
            if lower(value) not in row.silent or value is True:
                body.warn(name, row.reason)
        else:
            body.fields[name] = value
    for name in ("prompt", "negative_prompt"):
        _check_syntax(body, name)
    checkpoint = _read_options(body, values.get(OVERRIDES))
    body.fields |= _count(values, max_n)
    send_images = _send_images(body, values.get("send_images"))
    try:
        request = request_model("common", any_fields=True).model_validate(
            {**body.fields, "response_format": "b64_json"}
        )
    except ValidationError as error:
        # FastAPI's places begin with the body's.
        problems = error.errors(include_url=False, include_input=False)
        raise RequestValidationError(
            [{**problem, "loc": ("body", *problem["loc"])} for problem in problems]
        ) from None
    request.warnings[:0] = body.warnings
    return Txt2Img(request, checkpoint, send_images)


def _refuse(name: str, value: Any) -> None:
    """Refuse what cannot be done, unless nothing is asked for."""
    if name == "alwayson_scripts":
        asking = _asking_scripts(name, value)
        if asking is None:
            return
        what = f"{name}: {shown(asking)} is not supported"
    elif _asks(value):
        what = f"{name} is not supported"
    else:
        return
    raise invalid(name, f"{what}: {REFUSED[name]}", "unsupported_parameter")


def _asks(value: Any) -> bool:
    """Whether a value asks for anything."""
    return bool(value) and value != -1 and lower(value) not in ("", "none", "false")


def _asking_scripts(name: str, value: Any) -> str | None:
    """The first of the webui's extensions that is asked to do something."""
    if value in ("", []):
        return None
    if not isinstance(value, Mapping):
        raise invalid(name, f"{name}: must be an object, got {shown(value)}")
    for script, settings in value.items():
        arguments = settings.get("args") if isinstance(settings, Mapping) else settings
        units = arguments if isinstance(arguments, list) else [arguments]
        if any(_asks_unit(unit) for unit in units):
            return str(script)
    return None


def _asks_unit(unit: Any) -> bool:
    """Whether an argument of an extension asks for anything: ControlNet's and ADetailer's are sent
    switched off too.
    """
    if isinstance(unit, Mapping):
        off = unit.get("enabled", True) is False or unit.get("enable", True) is False
        return not off and lower(unit.get("ad_model", "some")) != "none" and bool(unit)
    return _asks(unit)


def _check_syntax(body: _Body, name: str) -> None:
    """Refuse what a prompt's text asks of the webui for another model, name what it weighs."""
    text = body.fields.get(name)
    if not isinstance(text, str):
        return
    if found := _ADAPTER.search(text):
        message = f"{name}: {shown(found[0])} asks for an adapter, and none are served"
        raise invalid(name, message, "unsupported_value")
    if found := _WEIGHT.search(text):
        body.warnings.append(f"{name}: {shown(found[0])} is read as text; there are no weights")


def _read_options(body: _Body, options: Any) -> str | None:
    """The webui's options of one request; the model that they name."""
    if options is None or options == "" or options == []:
        return None
    if not isinstance(options, Mapping):
        raise invalid(OVERRIDES, f"{OVERRIDES}: must be an object, got {shown(options)}")
    written = lower(options.get("samples_format"))
    for name, value in options.items():
        if value is None or name in ("sd_model_checkpoint", "samples_format"):
            continue
        if name == "jpeg_quality":
            # As in the webui, a quality says nothing of png.
            if written not in (None, "", "png"):
                body.fields["output_compression"] = value
        elif lower(value) not in OPTIONS_NO_EFFECT.get(name, ()):
            body.warn(f"{OVERRIDES}.{printable(name)}", "it is no option here")
    if written not in (None, ""):
        body.fields["output_format"] = written
    return checkpoint_of(options, f"{OVERRIDES}.")


def checkpoint_of(options: Mapping[str, Any], place: str = "") -> str | None:
    """The model that options name.

    Args:
        place: what its name begins with in errors.

    Raises:
        ApiError: 400, it is no name.
    """
    name = "sd_model_checkpoint"
    value = options.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise invalid(place + name, f"{place}{name}: must be text, got {shown(value)}")
    return value


def _count(values: Mapping[str, Any], max_n: int) -> dict[str, int]:
    """How many images: batches times images of each."""
    asked: dict[str, int] = {}
    for name in _COUNTS:
        value = whole(name, values.get(name))
        if value is None or value == "":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= max_n:
            raise invalid(name, f"{name}: must be between 1 and {max_n}, got {shown(value)}")
        asked[name] = value
    if not asked:
        return {}
    product = asked.get("batch_size", 1) * asked.get("n_iter", 1)
    if product > max_n:
        text = f"n_iter: batch_size times n_iter must be at most {max_n}, got {product}"
        raise invalid("n_iter", text)
    return {"batch_size": product}


def _send_images(body: _Body, value: Any) -> bool:
    if value is None or value == "":
        return True
    wanted = flag("send_images", value)
    if not isinstance(wanted, bool):
        raise invalid("send_images", f"send_images: must be true or false, got {shown(value)}")
    if not wanted:
        body.warnings.append("send_images: the images are in no answer, and are not kept here")
    return wanted
