"""PEFT's config of an adapter: a factor's scale, where the file has no alpha of its own.

PEFT writes it as ``adapter_config.json``, Diffusers into the file's metadata.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from krea2_srt.errors import AdapterError
from krea2_srt.lora.keys import shown
from krea2_srt.lora.limits import Limits

_DIFFUSERS_CONFIG = "lora_adapter_metadata"
_PEFT_MODEL = "base_model.model."
_DIFFUSERS_PART = "transformer."

_CHANGES_MORE = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
"""By these the product of the two factors is no longer what is added to the matrix."""

_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "mica", "orthogonal")
"""How training may have begun. By all others PEFT changes the model's own weights as well; after
``convert_pissa_to_lora`` and its like the config says True."""

_PATTERN = re.compile(r"\^?(?:[\w-]|\\?\.)+")
"""Module names. PEFT takes any regular expression, and one from outside can take forever."""


@dataclass(frozen=True)
class PeftConfig:
    """The part of PEFT's ``LoraConfig`` that a factor's scale depends on.

    Attributes:
        alpha, rank: of modules without one of their own.
        alpha_pattern, rank_pattern: by a module's name or the end of it; the first that fits.
        rslora: whether alpha is divided by the rank's root, not by the rank.
        prefix: of modules in the file, that they do not have in the patterns.
    """

    alpha: float
    rank: int
    alpha_pattern: Mapping[str, float]
    rank_pattern: Mapping[str, float]
    rslora: bool
    prefix: str

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], prefix: str) -> "PeftConfig":
        """Read a config; fields that only matter while training are ignored.

        Args:
            values: the fields.
            prefix: see `PeftConfig`.

        Raises:
            AdapterError: it is not a plain LoRA's, or a value is impossible.
        """
        kind = values.get("peft_type", "LORA")
        if kind != "LORA":
            raise AdapterError(f"peft_type is {_value(kind)}; only 'LORA' is read")
        for field in _CHANGES_MORE:
            if values.get(field):
                raise AdapterError(f"{field} is {_value(values[field])}; only plain LoRA is read")
        start = values.get("init_lora_weights", True)
        if (start.lower() if isinstance(start, str) else start) not in _PLAIN_STARTS:
            raise AdapterError(
                f"init_lora_weights is {_value(start)}, by which PEFT changes the model's own "
                f"weights too; save it as a plain LoRA"
            )
        return cls(
            _number("lora_alpha", values.get("lora_alpha")),
            _rank("r", values.get("r")),
            _pattern(values, "alpha_pattern", _number),
            _pattern(values, "rank_pattern", _rank),
            _switch("use_rslora", values.get("use_rslora", False)),
            prefix,
        )

    def scale(self, module: str, rank: int) -> float:
        """What a module's product is multiplied by.

        Args:
            module: its name in the file.
            rank: of the factors in the file.

        Raises:
            AdapterError: the config says another rank.
        """
        module = module.removeprefix(self.prefix)
        expected = _match(self.rank_pattern, module, self.rank)
        if expected != rank:
            raise AdapterError(f"{shown(module)} has rank {rank}, PEFT's config says {expected}")
        alpha = _match(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def config_of_folder(file: Path, limits: Limits) -> PeftConfig:
    """The config in ``adapter_config.json``.

    Raises:
        AdapterError: it is not text, or see `PeftConfig.from_dict`.
        OSError: it cannot be read.
    """
    try:
        size = file.stat().st_size
        text = "" if size > limits.config_bytes else file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise AdapterError(f"{file.name} is not UTF-8: {shown(str(error))}") from None
    if not text:
        raise AdapterError(f"{file.name} has {size} bytes, expected 1 to {limits.config_bytes}")
    return _config(_json_object(text, file.name), file.name, _PEFT_MODEL)


def config_in_metadata(metadata: Mapping[str, str], limits: Limits) -> PeftConfig | None:
    """The config that Diffusers puts into a file's metadata, if it is there.

    Pipelines put the part's name before each field, a transformer on its own does not.

    Raises:
        AdapterError: it cannot be read, or see `PeftConfig.from_dict`.
    """
    text = metadata.get(_DIFFUSERS_CONFIG)
    if text is None:
        return None
    if len(text) > limits.config_bytes:
        raise AdapterError(
            f"{_DIFFUSERS_CONFIG} has {len(text)} characters, more than {limits.config_bytes}"
        )
    fields = _json_object(text, _DIFFUSERS_CONFIG)
    ours = {
        field.removeprefix(_DIFFUSERS_PART): value
        for field, value in fields.items()
        if field.startswith(_DIFFUSERS_PART)
    }
    return _config(ours or fields, _DIFFUSERS_CONFIG, _DIFFUSERS_PART) if fields else None


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{where} is no JSON: {shown(str(error))}") from None
    if not isinstance(values, dict):
        raise AdapterError(f"{where} must be a JSON object")
    return values


def _config(fields: Mapping[str, Any], where: str, prefix: str) -> PeftConfig:
    try:
        return PeftConfig.from_dict(fields, prefix)
    except AdapterError as error:
        raise AdapterError(f"{where}: {error}") from None


def _match(pattern: Mapping[str, float], module: str, default: float) -> float:
    for name, value in pattern.items():
        plain = name.replace("\\.", ".")
        if plain.startswith("^"):
            if plain[1:] == module:
                return value
        elif f".{module}".endswith(f".{plain}"):
            return value
    return default


def _pattern(values: Mapping[str, Any], field: str, check: Any) -> dict[str, float]:
    pattern = values.get(field) or {}
    if not isinstance(pattern, dict):
        raise AdapterError(f"{field} must be an object, got {_value(pattern)}")
    for name in pattern:
        if not _PATTERN.fullmatch(name):
            raise AdapterError(f"{field}: {_value(name)} is no module's name")
    return {name: check(f"{field}: {name}", value) for name, value in pattern.items()}


def _number(field: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < abs(value) < 1e9:
        raise AdapterError(f"{shown(field)} must be a number other than 0, got {_value(value)}")
    return float(value)


def _rank(field: str, value: Any) -> int:
    if type(value) is not int or not 0 < value < 1e6:
        raise AdapterError(f"{shown(field)} must be a positive integer, got {_value(value)}")
    return value


def _switch(field: str, value: Any) -> bool:
    if type(value) is not bool:
        raise AdapterError(f"{field} must be true or false, got {_value(value)}")
    return value


def _value(value: object) -> str:
    return shown(repr(value))
