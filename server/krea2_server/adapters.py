"""The adapters that a request asks for: in a field, by the model's name, or in its prompt."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from krea2_server.api.schemas import ImageGenerationRequest
from krea2_server.api.spelling import shown
from krea2_server.engine.base import Engine
from krea2_server.errors import ApiError, invalid
from krea2_server.keys import Client
from krea2_srt.errors import RequestError
from krea2_srt.request import (
    ADAPTER_NAMES,
    MAX_ADAPTERS,
    AdapterChoice,
    AdapterUse,
    check_scale,
    is_adapter_name,
)

_TAG = re.compile(r"<(?:lora|lyco):([^<>]{0,300})>", re.IGNORECASE)
_TAG_AND_BLANKS = re.compile(rf"\s+{_TAG.pattern}(?=\s|$)|{_TAG.pattern}", re.IGNORECASE)
_LIKE_A_TAG = re.compile(r"(?:<|&lt;)\s{0,9}(?:lora|lyco)\s{0,9}:", re.IGNORECASE)
_MAX_TOLD = 10


@dataclass
class AskedAdapters:
    """What a request asks for.

    Attributes:
        choices: by name.
    """

    choices: dict[str, AdapterChoice] = field(default_factory=dict)

    @property
    def frozen(self) -> frozenset[AdapterChoice]:
        """All of them, for the engine."""
        return frozenset(self.choices.values())

    @property
    def longest(self) -> frozenset[AdapterUse]:
        """What takes the most room where files tell of them, whatever they prove to be."""
        return frozenset(AdapterUse(name, "0" * 64, -1 / 3) for name in self.choices)

    def add(self, name: str, scale: float | None, param: str) -> None:
        """One more.

        Raises:
            ApiError: 400, there cannot be one of this name, it is there already, or too many are.
        """
        name = name.removesuffix(".safetensors")
        if not is_adapter_name(name):
            text = f"{param}: {shown(name)} cannot be an adapter's name: {ADAPTER_NAMES}"
            raise invalid(param, text)
        if name in self.choices:
            raise invalid(param, f"{param}: {name} is asked for twice; give one scale")
        if len(self.choices) == MAX_ADAPTERS:
            raise invalid(param, f"{param}: at most {MAX_ADAPTERS} adapters at a time")
        if scale is not None:
            try:
                check_scale(param, name, scale)
            except RequestError as error:
                raise invalid(param, str(error)) from None
        self.choices[name] = AdapterChoice(name, scale)

    def add_tags(self, prompt: str, param: str) -> str:
        """Those that a prompt names as A1111's do, ``<lora:NAME:SCALE>``.

        Returns:
            The prompt without them: they are nothing to generate.

        Raises:
            ApiError: as `add`; or a tag cannot be read, or nothing is left beside them.
        """
        for name, scale in _tags(prompt, param):
            self.add(name, scale, param)
        rest = _TAG_AND_BLANKS.sub("", prompt)
        if (like := _LIKE_A_TAG.search(rest)) is not None:
            shown_text = shown(rest[like.start() : like.start() + 40])
            raise invalid(param, f"{param}: {shown_text} cannot be read; <lora:NAME:SCALE> can")
        if rest == prompt:
            return prompt
        if not rest.strip():
            raise invalid(param, f"{param}: must say what to generate, beside adapters")
        return rest.strip()


def name_model_adapter(request: ImageGenerationRequest, adapter: str | None, param: str) -> None:
    """Say which adapter the model's name has, in one of the fields that may name the model.

    Args:
        adapter: None is none, and changes nothing.
        param: what the client calls the field.

    Raises:
        ApiError: 400, another field has said another one.
    """
    if adapter is None:
        return
    before = request.model_adapter
    if before not in (None, adapter):
        text = f"{param}: names adapter {shown(adapter)}, and {request.sent_as('model')} {before!r}"
        raise invalid(param, text)
    request.set_model_adapter(adapter, param)


def refuse_tags(text: str, param: str) -> None:
    """Check that a text names no adapter, which would be taken for words.

    Raises:
        ApiError: 400, it does.
    """
    if (tag := _LIKE_A_TAG.search(text)) is not None:
        what = shown(text[tag.start() : tag.start() + 40])
        raise invalid(param, f"{param}: {what} belongs into the prompt")


def _tags(prompt: str, param: str) -> Iterator[tuple[str, float | None]]:
    for tag in _TAG.finditer(prompt):
        name, *scales = (part.strip() for part in tag[1].split(":"))
        found = {_scale(text) for text in scales}
        # A1111 has two: of the text encoder, which no adapter of this model has, and of the rest.
        if len(found) > 1 or None in found or len(scales) > 2:
            text = f"{param}: {shown(tag[0])} cannot be read; <lora:NAME:SCALE> can"
            raise invalid(param, text)
        yield name, found.pop() if found else None


def _scale(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


async def unknown_adapter(
    engine: Engine,
    client: Client,
    asked: ImageGenerationRequest,
    choices: Iterable[AdapterChoice],
) -> ApiError:
    """What to say to a client that asks for an adapter that is not there for it.

    Args:
        asked: what it has sent.
        choices: all that it asks for.

    Raises:
        ApiError: 503, no replica answers.
    """
    infos = [info for info in await engine.adapters() if client.may_use(info.name)]
    there = [info.name for info in infos if not info.error]
    names = sorted(choice.name for choice in choices)
    name = next((name for name in names if name not in there), names[0])
    param = _field_of(name, asked)
    told = ", ".join(there[:_MAX_TOLD]) + (", ..." if len(there) > _MAX_TOLD else "")
    text = f"{param}: adapter {shown(name)} is not served here"
    text += f"; {told} {'are' if len(there) > 1 else 'is'}" if there else ", nor is any other"
    if name == asked.model_adapter:
        return ApiError(404, text, "model_not_found", param)
    return invalid(param, text, "unknown_adapter")


def _field_of(name: str, asked: ImageGenerationRequest) -> str:
    """Where a client has named an adapter."""
    if name == asked.model_adapter:
        return asked.sent_as("model")
    if any(one.name == name for one in asked.lora or ()):
        return asked.sent_as("lora")
    return asked.sent_as("prompt")
