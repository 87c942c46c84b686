"""The body of txt2img, read as the request that it stands for."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from krea2_server.a1111.fields import ASK_NOTHING, NO_EFFECT, OPTIONS_NO_EFFECT, REFUSED
from krea2_server.api.dialects import (
    NESTED,
    Translation,
    agreed,
    flattened,
    known_name,
    put,
    translate,
)
from krea2_server.api.field_errors import FieldError
from krea2_server.api.lenient import request_model
from krea2_server.api.schemas import ImageGenerationRequest
from krea2_server.api.spelling import flag, is_blank, lower, number, printable, shown, whole
from krea2_server.errors import invalid

OVERRIDES = "override_settings"
_COUNTS = ("batch_size", "n_iter")
_OWN = {OVERRIDES, "send_images", *_COUNTS}
"""Fields that have a function of their own here."""

_NAMES = {*ImageGenerationRequest.model_fields, *REFUSED, *NO_EFFECT, *ASK_NOTHING, *_OWN}
_KNOWN_OPTIONS = ("sd_model_checkpoint", "samples_format", "jpeg_quality")

MAX_WARNINGS = 32
"""Words on options; an object may hold a hundred thousand."""

_HYPERNETWORK = re.compile(r"<hypernet:[^<>]{0,200}>", re.IGNORECASE)
_WEIGHT = re.compile(r"\([^()]{1,500}:\s*[0-9.]{1,8}\s*\)|\[[^\[\]]{0,500}:\s*[0-9.]{1,8}\s*\]")


@dataclass
class Txt2Img:
    """What a front end has asked for.

    Attributes:
        request: in our words, with warnings of what had no effect.
        checkpoint: the model that it names, if it names one.
        overrides: what it calls its ``override_settings``.
        send_images: whether it wants to see the images.
    """

    request: ImageGenerationRequest
    checkpoint: str | None = None
    overrides: str = OVERRIDES
    send_images: bool = True


@dataclass
class _Body:
    """The body by whose fields they are; what was said of those that are nobody's.

    Attributes:
        own: name as sent and value, by A1111's name.
        others: fields that `api.dialects` may know.
    """

    own: dict[str, tuple[str, Any]] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def warn(self, name: str, why: str) -> None:
        if len(self.warnings) < MAX_WARNINGS:
            self.warnings.append(f"{name}: has no effect; {why}")

    def sent(self, known: str) -> tuple[str, Any]:
        """What the client calls a field of A1111's, and its value; None where there is none."""
        return self.own.get(known, (known, None))


def read_txt2img(values: Mapping[str, Any], max_n: int) -> Txt2Img:
    """Read a body.

    Args:
        values: the client's.
        max_n: images that one request may ask for.

    Raises:
        ApiError: 400, naming the field.
        RequestValidationError: the same, of a field that `ImageGenerationRequest` refuses.
    """
    try:
        return _read(_sorted(values), max_n)
    except FieldError as error:
        raise invalid(error.field, str(error), error.code) from None
    except RecursionError:
        raise invalid(None, "the body is nested too deeply") from None


def _sorted(values: Mapping[str, Any]) -> _Body:
    """The fields of a body, each by its own table, however it is spelled and wherever it is."""
    body = _Body()
    for name, value in flattened(values).items():
        known = known_name(name, _NAMES)
        if value is None or known in ASK_NOTHING:
            continue
        if known in _OWN:
            if not is_blank(value):
                body.own[known] = agreed(body.own.get(known), name, value)
        elif known in REFUSED:
            _refuse(known, name, value)
        elif (row := NO_EFFECT.get(known)) is not None:
            if row.is_asked(value):
                body.warn(name, row.reason)
        elif known in NESTED:
            raise FieldError(name, f"{name}: must not be inside of another object")
        else:
            body.others[name] = value
    return body


def _read(body: _Body, max_n: int) -> Txt2Img:
    result = translate(body.others, ImageGenerationRequest.model_fields)
    _put_count(result, body, max_n)
    checkpoint = _put_options(result, body)
    send_images = _send_images(body)
    result.body["response_format"] = "b64_json"
    result.warnings[:0] = body.warnings
    try:
        request = request_model("common", any_fields=True).model_validate(result)
    except ValidationError as error:
        # FastAPI's places begin with the body's.
        problems = error.errors(include_url=False, include_input=False)
        raise RequestValidationError(
            [{**problem, "loc": ("body", *problem["loc"])} for problem in problems]
        ) from None
    for name in ("prompt", "negative_prompt"):
        _check_syntax(request, name)
    return Txt2Img(request, checkpoint, body.sent(OVERRIDES)[0], send_images)


def _refuse(known: str, name: str, value: Any) -> None:
    """Refuse what cannot be done, unless nothing is asked for.

    Args:
        known: A1111's name of it.
        name: the client's.
    """
    if known == "alwayson_scripts":
        asking = _asking_scripts(name, value)
        if asking is None:
            return
        what = f"{name}: {shown(asking)} is not supported"
    elif _asks(value):
        what = f"{name} is not supported"
    else:
        return
    raise FieldError(name, f"{what}: {REFUSED[known]}", "unsupported_parameter")


def _asks(value: Any) -> bool:
    """Whether a value asks for anything."""
    value = number("", value)
    return bool(value) and value != -1 and lower(value) not in ("", "none", "false")


def _asking_scripts(name: str, value: Any) -> str | None:
    """The first of the webui's extensions that is asked to do something."""
    if value in ("", []):
        return None
    if not isinstance(value, Mapping):
        raise FieldError(name, f"{name}: must be an object, got {shown(value)}")
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


def _check_syntax(request: ImageGenerationRequest, field: str) -> None:
    """Refuse what a prompt's text asks of the webui for another model, name what it weighs."""
    text, name = getattr(request, field) or "", request.sent_as(field)
    if found := _HYPERNETWORK.search(text):
        message = f"{name}: {shown(found[0])} asks for a hypernetwork, and none are served"
        raise FieldError(name, message, "unsupported_value")
    if found := _WEIGHT.search(text):
        request.warnings.append(f"{name}: {shown(found[0])} is read as text; there are no weights")


def _put_options(result: Translation, body: _Body) -> str | None:
    """Set what the webui's options of one request say; the model that they name."""
    place, options = body.sent(OVERRIDES)
    if options is None or options == []:
        return None
    if not isinstance(options, Mapping):
        raise FieldError(place, f"{place}: must be an object, got {shown(options)}")
    for name, value in options.items():
        if value is None or name in _KNOWN_OPTIONS:
            continue
        if lower(value) not in OPTIONS_NO_EFFECT.get(name, ()):
            body.warn(f"{place}.{printable(name)}", "it is no option here")
    _put_option(result, "output_format", place, options, "samples_format")
    # As in the webui, a quality says nothing of png.
    if result.body.get("output_format") not in (None, "png"):
        _put_option(result, "output_compression", place, options, "jpeg_quality")
    return checkpoint_of(options, f"{place}.")


def _put_option(
    result: Translation, ours: str, place: str, options: Mapping[str, Any], name: str
) -> None:
    if not is_blank(options.get(name)):
        put(result, ours, f"{place}.{name}", options[name])


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


def _put_count(result: Translation, body: _Body, max_n: int) -> None:
    """Set how many images: batches times images of each."""
    asked: dict[str, int] = {}
    for known in _COUNTS:
        name, value = body.sent(known)
        if value is None:
            continue
        value = whole(name, value)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= max_n:
            raise FieldError(name, f"{name}: must be between 1 and {max_n}, got {shown(value)}")
        asked[name] = value
    if not asked:
        return
    *_, name = asked
    count, product = math.prod(asked.values()), " times ".join(asked)
    if count > max_n:
        raise FieldError(name, f"{name}: {product} must be at most {max_n}, got {count}")
    said = result.body.get("n")
    if len(asked) > 1 and said not in (None, count):
        other = result.sent_as.get("n", "n")
        raise FieldError(name, f"{name}: {product} is {count}, not {other}, {shown(said)}")
    put(result, "n", name, count)


def _send_images(body: _Body) -> bool:
    name, value = body.sent("send_images")
    if value is None:
        return True
    wanted = flag(name, value)
    if not isinstance(wanted, bool):
        raise FieldError(name, f"{name}: must be true or false, got {shown(value)}")
    if not wanted:
        body.warnings.append(f"{name}: the images are in no answer, and are not kept here")
    return wanted
