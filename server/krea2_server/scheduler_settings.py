"""Settings of the scheduler processes, as `krea2_srt` declares them."""

from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

from krea2_srt.engine.config import EngineConfig
from krea2_srt.environment import PREFIX
from krea2_srt.runner.config import RunnerConfig
from krea2_srt.setting import Setting, settings_of


class SchedulerSettings(BaseModel):
    """What a scheduler process reads from its environment. None is what it has there already, and
    its own default otherwise.
    """

    model_config = ConfigDict(extra="forbid")

    def environment(self) -> dict[str, str]:
        """As it reads them."""
        return {
            PREFIX + name.upper(): str(value)
            for name, value in self.model_dump(exclude_none=True).items()
        }


def _settings_model(name: str, config: type[Any], help: str) -> type[SchedulerSettings]:
    """A model with a config's settings.

    Args:
        name: of the class.
        config: `EngineConfig` or `RunnerConfig`, which has their bounds too: values are checked
            by making one, so that all who read them say the same of a wrong one.
        help: of the group in ``--help``.
    """
    hints = get_type_hints(config)
    fields: dict[str, Any] = {
        name: (_type(hints[name] | None, declared), Field(None, description=_description(declared)))
        for name, declared in settings_of(config).items()
    }
    return create_model(name, __base__=SchedulerSettings, __doc__=help, **fields)


def _type(hint: Any, declared: Setting) -> Any:
    if {"on", "off"} <= set(declared.choices):
        return Annotated[hint, BeforeValidator(_on_or_off)]
    if declared.or_count:
        return Annotated[hint, BeforeValidator(text_of_number)]
    return hint


def _on_or_off(value: Any) -> Any:
    """YAML reads on and off, without quotes, as true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def text_of_number(value: Any) -> Any:
    """For a text that may be a whole number, which YAML reads as one."""
    return str(value) if type(value) is int else value


def _description(declared: Setting) -> str:
    text = declared.help
    if declared.choices:
        *others, last = (*declared.choices, *(["a number"] if declared.or_count else []))
        text = f"{', '.join(others)} or {last}: {text}"
    return f"{text}; default {declared.default_text}" if declared.default_text else text


if TYPE_CHECKING:
    EngineSettings = SchedulerSettings
    RunnerSettings = SchedulerSettings
else:
    EngineSettings = _settings_model(
        "EngineSettings", EngineConfig, "of the engine's step scheduler; see docs/scheduling.md"
    )
    RunnerSettings = _settings_model(
        "RunnerSettings", RunnerConfig, "of the model runner; see docs/gpu.md"
    )
