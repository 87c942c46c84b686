"""All settings of the images server: one object, from a file, the environment and flags."""

import ipaddress
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from krea2_srt.engine.config import PREFIX as ENGINE_PREFIX
from krea2_srt.engine.config import EngineConfig
from krea2_srt.errors import ConfigError

COMMAND = "krea2-serve"
PREFIX = "KREA2_SERVE_"
"""Environment variables are this and the setting's name in capitals, KREA2_SERVE_MAX_N."""

_NESTED = "__"
_CONFIG = "config"


class EngineSettings(BaseModel):
    """The engine's own settings; unset ones are the engine's defaults. See docs/scheduling.md."""

    model_config = ConfigDict(extra="forbid")

    policy: str | None = Field(None, description="order of the queue: edf, srpt or fcfs")
    max_turn_ms: float | None = Field(None, description="longest planned unit of work")
    max_pack_tokens: int | None = Field(None, description="most tokens in one forward")
    max_pack_sequences: int | None = Field(None, description="most images in one forward")
    max_active_sequences: int | None = Field(None, description="most images begun and not ended")
    max_held_steps: int | None = Field(None, description="most steps waiting between two slices")
    max_queue_s: float | None = Field(
        None, description="estimated seconds of work beyond which requests are refused with 429"
    )
    max_side: int | None = Field(None, description="pixels of an image's longer side")
    max_pixels: int | None = Field(None, description="width times height of an image")
    max_steps: int | None = Field(None, description="denoising steps of an image")
    max_images: int | None = Field(None, description="images of one request, whoever asks")
    max_guidance: float | None = Field(None, description="largest guidance scale")

    def environment(self) -> dict[str, str]:
        """As the engine reads them."""
        return {
            ENGINE_PREFIX + name.upper(): str(value)
            for name, value in self.model_dump(exclude_none=True).items()
        }


class Settings(BaseSettings):
    """Of ``krea2-serve``; a description is what ``--help`` says."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter=_NESTED, extra="forbid", hide_input_in_errors=True
    )

    config: Path | None = Field(None, description="YAML file with any of these settings")

    # What is served, and where.
    model_path: str = Field(
        "krea/Krea-2-Turbo", description="folder or repo id of a Krea 2 checkpoint"
    )
    served_model_name: str = Field(
        "", description="what clients call it; the last part of the model path by default"
    )
    model_aliases: list[str] = Field([], description="other names that clients may use for it")
    replicas: int = Field(1, ge=1, le=64, description="scheduler processes, one for each GPU")
    sglang_args: str = Field("", description="further options of SGLang, as on a command line")
    engine_endpoints: list[str] = Field(
        [], description="use schedulers that run already, tcp://host:port, and start none"
    )
    engine: EngineSettings = EngineSettings()
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(30000, ge=0, le=65535, description="port to listen on; 0 is any free one")
    public_url: str = Field(
        "", description="how clients reach this server, for URLs of images; default: as they asked"
    )
    playground: bool = Field(True, description="serve the playground at /")

    # Who may ask, and how much.
    api_keys_file: Path | None = Field(None, description="YAML file of keys; see docs/server.md")
    api_keys: SecretStr = Field(
        SecretStr(""), description="keys with the default limits, separated by commas"
    )
    allow_anonymous: bool = Field(
        False, description="without keys, listen on other addresses than loopback too"
    )
    requests_per_minute: float = Field(0, ge=0, description="of one key; 0 is no limit")
    max_concurrent: int = Field(0, ge=0, description="requests of one key at a time; 0: no limit")
    max_requests: int = Field(
        4096, ge=1, description="requests at a time beyond which new ones are answered with 503"
    )
    max_n: int = Field(10, ge=1, le=10, description="images of one request")
    max_prompt: int = Field(32_000, ge=1, le=32_000, description="characters of a prompt")
    max_body_bytes: int = Field(2**20, ge=1024, description="of a request")
    max_header_bytes: int = Field(32_768, ge=1024, description="of a request's line and headers")
    header_timeout_s: float = Field(10, gt=0, description="for a request's headers to arrive")
    body_timeout_s: float = Field(30, gt=0, description="for a request's body to arrive")
    send_timeout_s: float = Field(
        60, gt=0, description="without a byte taken, after which a client is hung up on"
    )
    allow_unknown_fields: bool = Field(False, description="ignore fields that are not known")

    # What is drawn.
    moderation_policy: Path | None = Field(
        None, description="YAML file of content checks; see docs/moderation.md"
    )

    # Where response_format=url puts images.
    storage: str = Field(
        "", description="folder, or s3://bucket/prefix; default: a folder in the user's cache"
    )
    storage_options: dict[str, Any] = Field({}, description="of the S3 file system, as JSON")
    storage_key: SecretStr = Field(
        SecretStr(""), description="signs URLs; default: a random one, kept in the folder"
    )
    url_expiry_s: float = Field(3600, gt=0, description="life of a URL")
    max_storage_bytes: int = Field(10 * 2**30, gt=0, description="beyond it the oldest go")

    # Running it.
    keepalive_s: float = Field(10, gt=0, description="between comments in a silent stream")
    drain_timeout_s: float = Field(120, gt=0, description="for requests to end after SIGTERM")
    start_timeout_s: float = Field(1800, gt=0, description="for an engine to load the model")
    hang_timeout_s: float = Field(
        300, gt=0, description="without an answer after which an engine is killed"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least")
    log_format: Literal["text", "json"] = Field("text", description="one line an event, either way")
    otlp_endpoint: str = Field(
        "", description="send OpenTelemetry traces there, http://collector:4318/v1/traces"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # What is passed to the constructor is the file's.
        return env_settings, init_settings

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return self.served_model_name or self.model_path.rstrip("/").rsplit("/", 1)[-1].lower()

    @property
    def sglang_options(self) -> list[str]:
        return shlex.split(self.sglang_args)

    @property
    def storage_folder(self) -> Path:
        """Of a local store."""
        if self.storage:
            return Path(self.storage).expanduser()
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cache / "krea2-srt" / f"images-{self.port}"

    @model_validator(mode="after")
    def _check(self) -> "Settings":
        has_keys = self.api_keys_file is not None or self.api_keys.get_secret_value().strip()
        if not has_keys and not self.allow_anonymous and not _is_loopback(self.host):
            raise ValueError(
                f"host: {self.host} can be reached from outside, and there are no API keys; give "
                "--api-keys-file, or --allow-anonymous if that is meant"
            )
        visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        if visible and self.replicas > len(visible):
            raise ValueError(
                f"replicas: {self.replicas} need as many GPUs, and CUDA_VISIBLE_DEVICES names "
                f"{len(visible)}"
            )
        try:
            self.sglang_options  # noqa: B018
        except ValueError as error:
            raise ValueError(f"sglang_args: {error}") from None
        try:
            EngineConfig.from_environment({**os.environ, **self.engine.environment()})
        except ConfigError as error:
            raise ValueError(f"engine: {error}") from None
        return self


def load_settings(argv: Sequence[str]) -> Settings:
    """Flags before the environment before the file before the defaults.

    Raises:
        ConfigError: naming the setting.
        SystemExit: after ``--help``.
    """
    _refuse_unknown_variables(os.environ)
    path = _config_path(argv)
    values = _read_file(path) if path else {}
    try:
        flags: CliSettingsSource[Any] = CliSettingsSource(
            Settings,
            cli_prog_name=COMMAND,
            cli_parse_args=list(argv),
            cli_kebab_case=True,
            cli_implicit_flags=True,
            cli_avoid_json=True,
            cli_hide_none_type=True,
            cli_exit_on_error=False,
        )
        return Settings(_cli_settings_source=flags, **values)
    except ValidationError as error:
        raise ConfigError(_first_problem(error)) from None
    except SettingsError as error:
        raise ConfigError(str(error).splitlines()[0].removeprefix("error parsing CLI: ")) from None


def _config_path(argv: Sequence[str]) -> str | None:
    for index, argument in enumerate(argv):
        if argument == "--config" and index + 1 < len(argv):
            return argv[index + 1]
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
    return os.environ.get(PREFIX + _CONFIG.upper())


def _read_file(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"config: {path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config: {path} must hold settings, name: value")
    unknown = sorted(map(str, values.keys() - Settings.model_fields.keys() - {_CONFIG}))
    if unknown:
        raise ConfigError(f"config: {path}: {unknown[0]}: is not known")
    return {name: value for name, value in values.items() if name != _CONFIG}


def _refuse_unknown_variables(environment: Mapping[str, str]) -> None:
    for variable in environment:
        name = variable.removeprefix(PREFIX).lower()
        if variable.startswith(PREFIX) and name.split(_NESTED)[0] not in Settings.model_fields:
            raise ConfigError(f"{variable}: is not known")


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
