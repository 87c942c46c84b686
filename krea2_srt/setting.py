"""A setting of the engine or the runner: a field of a config that says all there is to say of it.

Flags, variables, files, ``--help`` and the tables in docs/ are made from these.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, TypeVar

from krea2_srt.errors import ConfigError

T = TypeVar("T", str, int, float)

_KEY = "setting"


@dataclass(frozen=True)
class Setting:
    """What a setting is for, and which values it may have.

    Attributes:
        default: its value where nobody sets it.
        help: in a few words, with its unit.
        choices: all values that it may have; none is any.
        least: smallest number that it may be.
        above: number that it must be greater than.
        or_count: whether it may be a whole number too, 0 or greater, beside the choices.
    """

    default: str | int | float
    help: str
    choices: tuple[str, ...] = ()
    least: float | None = None
    above: float | None = None
    or_count: bool = False

    @property
    def default_text(self) -> str:
        """The default as a person would write it; "" if it is nothing."""
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)

    def problem(self, value: Any) -> str:
        """What is wrong with a value, and what would be right; "" if nothing is."""
        if problem := self._type_problem(value):
            return problem
        if self.choices and value not in self.choices:
            if not self.or_count:
                return f"must be one of {', '.join(self.choices)}, got {value!r}"
            if not (value.isascii() and value.isdecimal()):
                choices = ", ".join(self.choices)
                return f"must be {choices} or a whole number, 0 or greater, got {value!r}"
        if isinstance(value, float) and not math.isfinite(value):
            return f"must be a finite number, got {value}"
        if self.least is not None and value < self.least:
            return f"must be {self.least:g} or greater, got {value}"
        if self.above is not None and value <= self.above:
            return f"must be greater than {self.above:g}, got {value}"
        return ""

    def _type_problem(self, value: Any) -> str:
        kinds = {str: (str,), int: (int,), float: (int, float)}[type(self.default)]
        if isinstance(value, kinds) and not isinstance(value, bool):
            return ""
        wanted = {str: "text", int: "a whole number", float: "a number"}[type(self.default)]
        return f"must be {wanted}, got {value!r}"


def setting(
    default: T,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    above: float | None = None,
    or_count: bool = False,
) -> T:
    """The field of a dataclass that is a setting; see `Setting`."""
    metadata = {_KEY: Setting(default, help, choices, least, above, or_count)}
    field: T = dataclasses.field(default=default, metadata=metadata)
    return field


def same_setting(config: type[Any], name: str) -> Any:
    """A field like another class's: the same default and the same `Setting`."""
    (field,) = (one for one in dataclasses.fields(config) if one.name == name)
    return dataclasses.field(default=field.default, metadata=field.metadata)


def settings_of(config: Any) -> dict[str, Setting]:
    """The settings of a config, by their names."""
    return {field.name: field.metadata[_KEY] for field in dataclasses.fields(config)}


def check_settings(config: Any) -> None:
    """Check every value of a config.

    Raises:
        ConfigError: naming the first that is wrong.
    """
    for name, declared in settings_of(config).items():
        if problem := declared.problem(getattr(config, name)):
            raise ConfigError(f"{name}: {problem}")
