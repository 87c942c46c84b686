"""Settings from environment variables: KREA2_SRT_ and a field's name in capitals."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from krea2_srt.engine.config import EngineConfig
from krea2_srt.errors import ConfigError
from krea2_srt.runner.config import RunnerConfig
from krea2_srt.service_links import is_service_link

PREFIX = "KREA2_SRT_"


@dataclass(frozen=True)
class Environment:
    """All settings that are read from variables."""

    engine: EngineConfig
    runner: RunnerConfig


def read_environment(variables: Mapping[str, str] = os.environ) -> Environment:
    """Read ``KREA2_SRT_*``, but for Kubernetes' service links.

    Raises:
        ConfigError: naming the variable whose value is wrong, or that is unknown.
    """
    configs: dict[str, type[Any]] = {"engine": EngineConfig, "runner": RunnerConfig}
    owners = {f.name: part for part, c in configs.items() for f in dataclasses.fields(c)}
    values: dict[str, dict[str, str | int | float]] = {part: {} for part in configs}
    for variable, text in variables.items():
        if not variable.startswith(PREFIX) or is_service_link(variable, text):
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name not in owners:
            known = ", ".join(sorted(PREFIX + f.upper() for f in owners))
            raise ConfigError(f"unknown setting {variable}; known are {known}")
        part = owners[name]
        kind = type(getattr(configs[part](), name))
        try:
            # A whole number may be 10.0, as in flags and files.
            is_whole = kind is int and float(text).is_integer()
            values[part][name] = int(float(text)) if is_whole else kind(text)
        except (ValueError, OverflowError):
            wanted = "a whole number" if kind is int else "a number"
            raise ConfigError(f"{variable}: must be {wanted}, got {text!r}") from None
    try:
        return Environment(**{part: c(**values[part]) for part, c in configs.items()})
    except ConfigError as error:
        name, _, rest = str(error).partition(":")
        raise ConfigError(f"{PREFIX}{name.upper()}:{rest}") from None
