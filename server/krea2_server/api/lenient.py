"""Requests as they come: read by the tables of `dialects`, or with fields that nobody knows."""

import difflib
from collections.abc import Iterable
from functools import cache
from typing import Any, ClassVar, Self

from pydantic import ModelWrapValidatorHandler, ValidationError, create_model, model_validator

from krea2_server.api.dialects import (
    GUIDANCE_PLUS_ONE,
    NO_EFFECT,
    SYNONYMS,
    Translation,
    translate,
)
from krea2_server.api.field_errors import FieldError, UnknownFieldError
from krea2_server.api.schemas import UNSUPPORTED_FIELDS, ImageGenerationRequest
from krea2_server.api.spelling import printable

_MAX_NAME = 64
_MAX_UNKNOWN = 16
"""Unknown fields that are named; a body may hold a hundred thousand."""


class _Request(ImageGenerationRequest):
    """A request that says what has no effect in `warnings`.

    Attributes:
        common: whether other clients' words are read.
        any_fields: whether unknown fields are left out, and named.
    """

    common: ClassVar[bool]
    any_fields: ClassVar[bool]

    @property
    def is_lenient(self) -> bool:
        return self.common

    @model_validator(mode="wrap")
    @classmethod
    def _translate(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        fields = cls.model_fields
        if isinstance(values, Translation):
            # A1111's API has words of its own, and has translated them.
            result = values
        elif not isinstance(values, dict):
            return handler(values)
        else:
            try:
                result = translate(values, fields) if cls.common else Translation(dict(values))
            except RecursionError:
                raise FieldError("", "the body is nested too deeply") from None
        unknown = [n for n in result.body if n not in fields and n not in UNSUPPORTED_FIELDS]
        if unknown and not cls.any_fields:
            name = str(unknown[0])[:_MAX_NAME]
            raise UnknownFieldError(name, _closest(name, fields) if cls.common else None)
        for number, name in enumerate(unknown):
            del result.body[name]
            if number < _MAX_UNKNOWN:
                result.warnings.append(f"{printable(name)}: is not known, and was ignored")
        try:
            request = handler(result.body)
        except ValidationError as error:
            raise _as_sent(error, result) from None
        request._warnings = result.warnings
        request._sent_as = result.sent_as
        return request


@cache
def request_model(accept: str, any_fields: bool) -> type[ImageGenerationRequest]:
    """How the bodies of requests are read.

    Args:
        accept: ``common`` or ``openai``.
        any_fields: whether unknown fields are left out instead of refused.
    """
    if accept == "openai" and not any_fields:
        return ImageGenerationRequest
    # Of the same name: it is the API's description's too.
    name, text = ImageGenerationRequest.__name__, ImageGenerationRequest.__doc__
    model = create_model(name, __base__=_Request, __doc__=text)
    model.common, model.any_fields = accept == "common", any_fields
    return model


def _closest(name: str, fields: Iterable[str]) -> str | None:
    """The known field that a name may be meant to be."""
    known = [*fields, *SYNONYMS, *GUIDANCE_PLUS_ONE, *NO_EFFECT]
    return next(iter(difflib.get_close_matches(name.lower(), known, 1, 0.75)), None)


def _as_sent(error: ValidationError, result: Translation) -> Exception:
    """The first problem, with the name that the client has for its field."""
    problem = error.errors(include_url=False)[0]
    field = str(problem["loc"][0]) if problem["loc"] else ""
    sent = result.sent_as.get(field)
    reason = problem.get("ctx", {}).get("error")
    if isinstance(reason, FieldError):
        sent = result.sent_as.get(reason.field, reason.field)
        return FieldError(sent, str(reason).replace(reason.field, sent, 1), reason.code)
    return error if sent is None else FieldError(sent, f"{sent}: {problem['msg']}")
