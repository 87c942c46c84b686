"""All settings of the images server: one object, from a file, the environment and flags."""

import argparse
import ipaddress
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from krea2_server.comma_lists import CommaList
from krea2_server.json_objects import JsonObject
from krea2_server.proxies.hosts import checked_host, checked_network
from krea2_server.scheduler_settings import EngineSettings, RunnerSettings, text_of_number
from krea2_server.variables import Variables
from krea2_srt.cli.errors import add_version
from krea2_srt.environment import PREFIX as ENGINE_PREFIX
from krea2_srt.environment import read_environment
from krea2_srt.errors import ConfigError
from krea2_srt.model.parts import CheckpointSource
from krea2_srt.model.recipe import AUTO
from krea2_srt.runner.known_gpus import known_gpu
from krea2_srt.service_links import is_service_link
from krea2_srt.yaml_files import YamlFileError, read_yaml

COMMAND = "krea2-serve"
PREFIX = "KREA2_SERVE_"
"""Environment variables are this and the setting's name in capitals, KREA2_SERVE_MAX_N."""

_NESTED = "__"
_LORA_DIR = ENGINE_PREFIX + "LORA_DIR"
_RECIPE = ENGINE_PREFIX + "RECIPE"
_CONFIG = "config"


def _named(value: Any) -> Any:
    """A file's name; "" is what an unset variable leaves behind, and would be the folder here."""
    if value == "":
        raise ValueError("must be the name of a file, got an empty one")
    return value


def _checked_gpu(name: str) -> str:
    try:
        return known_gpu(name).name if name else name
    except ConfigError as error:
        raise ValueError(str(error).removeprefix("gpu: ")) from None


def _checked_url(url: str) -> str:
    """What the pattern lets through, such as half an IPv6 address."""
    try:
        urlsplit(url).port  # noqa: B018 (reads and checks it)
    except ValueError as error:
        raise ValueError(f"must be http://host:port/path, got {url!r}: {error}") from None
    return url


# Not for ever: a thousand hours are no limit in effect, and infinity fits no clock.
Seconds = Annotated[float, Field(gt=0, le=3.6e6, allow_inf_nan=False)]
File = Annotated[Path | None, BeforeValidator(_named)]
HttpUrl = Annotated[
    str, Field(pattern=r"^(https?://[^\s/?#]+[^\s?#]*)?$"), AfterValidator(_checked_url)
]
KnownGpuName = Annotated[str, BeforeValidator(text_of_number), AfterValidator(_checked_gpu)]
Network = Annotated[str, AfterValidator(checked_network)]
HostPattern = Annotated[str, AfterValidator(checked_host)]
Endpoint = Annotated[str, Field(pattern=r"^tcp://[^\s/:]+:[0-9]{1,5}$|^ipc://.+$")]

NO_STORAGE = "none"

_NEVER_TYPED = "\0"
"""The text of a flag that would be no value: pydantic-settings must have one, and takes "None" by
itself, which is a name like others in a variable.
"""


class Settings(BaseSettings):
    # The text that `--help` begins with; each description is what it says of a setting.
    """Serve a Krea 2 checkpoint behind OpenAI's images API, with a playground at /. Every flag is
    also a setting in the file of --config, max_n: 4, and a variable, KREA2_SERVE_MAX_N=4; flags
    come first, then variables, then the file. Lists are a,b or JSON; a flag may also be repeated.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter=_NESTED, extra="forbid", hide_input_in_errors=True
    )

    config: File = Field(None, description="YAML file with any of these settings")
    plan: bool = Field(
        False,
        description="serve nothing, but print how the GPU's memory would be used, and how long "
        "pictures would take; see docs/gpu.md",
    )
    gpu: KnownGpuName = Field(
        "", description="GPU to plan for, 4090 or A100-40GB; by default the one that is here"
    )

    # What is served, and where.
    model_path: str = Field(
        "krea/Krea-2-Turbo",
        description="folder, single file or repo id of a Krea 2 checkpoint; see "
        "docs/checkpoints.md",
    )
    recipe: Literal["auto", "turbo", "raw"] = Field(
        "auto",
        description="whether it is sampled as Turbo or as Raw, as runner.recipe; auto is what the "
        "checkpoint says of itself",
    )
    text_encoder: str = Field(
        "",
        description="folder, single file or repo id of a Qwen3-VL-4B; by default the "
        "checkpoint's own, or for a single file the released one",
    )
    vae: str = Field(
        "", description="folder, single file or repo id of a Qwen-Image VAE; by default likewise"
    )
    tokenizer: str = Field(
        "",
        description="folder of the tokenizer; by default the one beside the text encoder, or the "
        "checkpoint's",
    )
    served_model_name: str = Field(
        "",
        description="what clients call the model; by default the last part of its path, as the "
        "engine knows it",
    )
    model_aliases: CommaList[str] = Field(
        [],
        description="other names that clients may use for it; * is any without a colon",
    )
    replicas: int = Field(1, ge=1, le=64, description="scheduler processes, one for each GPU")
    quantization: Literal["none", "int8", "fp8"] = Field(
        "none", description="of the transformer's matrices; see docs/gpu.md"
    )
    sglang_args: str = Field(
        "", description="further options of SGLang for them, as on a command line"
    )
    engine_endpoints: CommaList[Endpoint] = Field(
        [], description="start no schedulers, but use those that listen at tcp://host:port"
    )
    lora_dir: File = Field(
        None,
        description="folder of adapters that requests may name, as runner.lora_dir; see "
        "docs/lora.md",
    )
    engine: EngineSettings = EngineSettings()
    runner: RunnerSettings = RunnerSettings()
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(30000, ge=0, le=65535, description="port to listen on; 0 is any free one")
    address_file: File = Field(
        None,
        description="file to hold the address that it listens at while it does, http://host:port; "
        "the image's health check asks there",
    )
    public_url: HttpUrl = Field(
        "",
        description="what the URLs of images begin with; by default what trusted_proxies say, an "
        "allowed host, or the address that the connection reaches; see docs/server.md",
    )
    trusted_proxies: CommaList[Network] = Field(
        [],
        description="addresses or networks of proxies whose X-Forwarded-* and Forwarded headers, "
        "and Host, say what the URLs of images begin with, 10.0.0.0/8; of no other are they read",
    )
    allowed_hosts: CommaList[HostPattern] = Field(
        [],
        description="hosts that the URLs of images may begin with where a request asks for them, "
        "images.example or *.images.example; the local host always may",
    )
    playground: bool = Field(True, description="serve the playground at /")

    # Who may ask, and how much.
    api_keys_file: File = Field(None, description="YAML file of keys; see docs/server.md")
    api_keys: SecretStr = Field(
        SecretStr(""),
        description="keys with the default limits, separated by commas; better as a variable, "
        "which other users of this machine cannot see",
    )
    allow_anonymous: bool = Field(
        False, description="let anybody ask who can reach --host, which is not loopback"
    )
    requests_per_minute: float = Field(
        0, ge=0, allow_inf_nan=False, description="of each key, or of all without one; 0: any"
    )
    max_concurrent: int = Field(
        0, ge=0, description="requests at a time of each key, or of all without one; 0: any"
    )
    max_requests: int = Field(
        4096, ge=1, description="requests at a time beyond which new ones are answered with 503"
    )
    max_n: int = Field(10, ge=1, le=10, description="images of one request")
    max_prompt: int = Field(32_000, ge=1, le=32_000, description="characters of a prompt")
    max_body_bytes: int = Field(2**20, ge=1024, description="size of a request's body")
    max_header_bytes: int = Field(
        32_768, ge=1024, description="size of a request's line and headers"
    )
    header_timeout_s: Seconds = Field(10, description="for a request's headers to arrive")
    body_timeout_s: Seconds = Field(30, description="for a request's body to arrive")
    send_timeout_s: Seconds = Field(
        60, description="after which a client that takes nothing of its answer is hung up on"
    )
    accept: Literal["common", "openai"] = Field(
        "common",
        description="requests in the words of common clients, see docs/clients.md, or by OpenAI's "
        "contract to the letter",
    )
    allow_unknown_fields: bool = Field(
        False, description="name fields of requests that are not known in the answer, not in a 400"
    )
    default_size: Annotated[str, Field(pattern=r"^(auto|[0-9]{2,5}x[0-9]{2,5})$")] = Field(
        "auto", description="of requests without one: WIDTHxHEIGHT, or auto: by quality"
    )
    default_response_format: Literal["b64_json", "url"] = Field(
        "b64_json", description="of requests without one"
    )
    default_embed_metadata: bool = Field(
        False,
        description="put prompts, seed and settings into the files of requests that do not say "
        "whether; see docs/server.md",
    )
    cors_origins: CommaList[str] = Field(
        [], description="origins whose pages may ask from a browser, https://host; * is all"
    )

    # What is generated.
    moderation_policy: File = Field(
        None, description="YAML file of content checks; see docs/moderation.md"
    )

    # Where response_format=url puts images.
    storage: str = Field(
        "",
        description=f"folder, s3://bucket/prefix, or {NO_STORAGE}: no URLs; by default a folder "
        "in the user's cache",
    )
    storage_options: JsonObject = Field({}, description="of the S3 file system, as JSON")
    storage_key: SecretStr = Field(
        SecretStr(""),
        description="signs the URLs of a folder; by default a random one, kept beside it",
    )
    url_expiry_s: Seconds = Field(3600, description="seconds after which a URL ends")
    max_storage_bytes: int = Field(
        10 * 2**30, gt=0, description="size of a folder beyond which the oldest images go"
    )

    # Running it.
    keepalive_s: Seconds = Field(10, description="between comments in a silent stream")
    json_keepalive_s: float = Field(
        0,
        ge=0,
        le=3.6e6,
        allow_inf_nan=False,
        description="between spaces ahead of an answer that does not stream, for proxies that cut "
        "silent calls; 0: none. See docs/operations.md",
    )
    drain_timeout_s: Seconds = Field(120, description="for requests to end after SIGTERM")
    start_timeout_s: Seconds = Field(1800, description="for a scheduler to load the model")
    hang_timeout_s: Seconds = Field(
        300, description="after which a scheduler that does not answer is started anew"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least important lines to log"
    )
    log_format: Literal["text", "json"] = Field("text", description="of a line, one an event")
    otlp_endpoint: HttpUrl = Field(
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
        return Variables(settings_cls), init_settings

    @property
    def sglang_options(self) -> list[str]:
        ours = [] if self.quantization == "none" else ["--quantization", self.quantization]
        return [*ours, *shlex.split(self.sglang_args)]

    @property
    def source(self) -> CheckpointSource:
        """The checkpoint that schedulers load."""
        return CheckpointSource(
            self.model_path,
            {**os.environ, **self.scheduler_environment}.get(_RECIPE, AUTO),
            text_encoder=self.text_encoder,
            vae=self.vae,
            tokenizer=self.tokenizer,
        )

    @property
    def storage_folder(self) -> Path:
        """Folder of a local store."""
        if self.storage:
            return Path(self.storage).expanduser()
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cache / "krea2-srt" / f"images-{self.port}"

    @property
    def plain_api_keys(self) -> list[str]:
        """Those that are no file's."""
        texts = self.api_keys.get_secret_value().split(",")
        return [key for text in texts if (key := text.strip())]

    @property
    def has_keys(self) -> bool:
        """Whether clients need one."""
        return self.api_keys_file is not None or bool(self.plain_api_keys)

    @property
    def scheduler_environment(self) -> dict[str, str]:
        """What scheduler processes read from their environment."""
        short = {} if self.lora_dir is None else {_LORA_DIR: str(self.lora_dir)}
        if self.recipe != AUTO:
            short[_RECIPE] = self.recipe
        return {**self.engine.environment(), **self.runner.environment(), **short}

    @model_validator(mode="after")
    def _check_access(self) -> "Settings":
        if not self.has_keys and not self.allow_anonymous and not _is_loopback(self.host):
            raise ValueError(
                f"host: {self.host} can be reached from outside, and there are no API keys; give "
                "--api-keys-file, or --allow-anonymous if that is meant"
            )
        return self

    @model_validator(mode="after")
    def _check_engine(self) -> "Settings":
        visible = visible_gpus()
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
            read_environment({**os.environ, **self.scheduler_environment})
        except ConfigError as error:
            variable, _, problem = str(error).partition(":")
            name = variable.removeprefix(ENGINE_PREFIX).lower()
            for part in ("engine", "runner"):
                if getattr(getattr(self, part), name, None) is not None:
                    raise ValueError(f"{part}.{name}:{problem}") from None
            raise ValueError(str(error)) from None
        return self

    @model_validator(mode="after")
    def _check_effects(self) -> "Settings":
        """Refuse what would be ignored."""
        if self.engine_endpoints:
            self._refuse_with("engine_endpoints", "replicas", "sglang_args", "engine", "runner")
            self._refuse_with("engine_endpoints", "quantization", "lora_dir", "start_timeout_s")
            self._refuse_with("engine_endpoints", "recipe", "text_encoder", "vae", "tokenizer")
            self._refuse_with("engine_endpoints", "plan")
        if self.gpu and not self.plan:
            raise ValueError("gpu: has no effect without plan")
        for name in ("lora_dir", "recipe"):
            # The same setting under two names.
            if getattr(self.runner, name, None) is not None:
                self._refuse_with(f"runner.{name}", name)
        if "--quantization" in {
            option.partition("=")[0] for option in shlex.split(self.sglang_args)
        }:
            self._refuse_with("--quantization of sglang_args", "quantization")
        if self.public_url:
            self._refuse_with("public_url", "trusted_proxies", "allowed_hosts")
        if "://" in self.storage or self.storage == NO_STORAGE:
            self._refuse_with(f"storage {self.storage}", "storage_key", "max_storage_bytes")
        if self.storage == NO_STORAGE and self.default_response_format == "url":
            raise ValueError("default_response_format: must be b64_json without a storage")
        if "://" not in self.storage:
            self._refuse_with("a folder as storage", "storage_options")
        return self

    def _refuse_with(self, what: str, *names: str) -> None:
        for name in names:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: has no effect with {what}")


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES names; empty where it names none or is not set."""
    return [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]


def load_settings(argv: Sequence[str]) -> Settings:
    """Flags before the environment before the file before the defaults.

    Raises:
        ConfigError: naming the setting.
        SystemExit: after ``--help`` or ``--version``.
    """
    refuse_unknown_variables(os.environ)
    # Of an empty name the model says what is wrong.
    path = _config_path(argv)
    values = _read_file(path) if path else {}
    try:
        return Settings(_cli_settings_source=_flags()(args=list(argv)), **values)
    except ValidationError as error:
        raise ConfigError(_first_problem(error)) from None
    except SettingsError as error:
        raise ConfigError(_settings_problem(error)) from None


@cache
def _flags() -> CliSettingsSource[Any]:
    """All flags, with their help; to make them takes longer than all the rest of loading."""
    flags: CliSettingsSource[Any] = CliSettingsSource(
        Settings,
        cli_prog_name=COMMAND,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_parse_none_str=_NEVER_TYPED,
        cli_exit_on_error=False,
        formatter_class=_HelpFormatter,
    )
    add_version(flags.root_parser)
    return flags


class _HelpFormatter(argparse.HelpFormatter):
    """Leaves away defaults that say nothing."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return re.sub(rf" \(default: ({_NEVER_TYPED}|\[\]|\{{\}}|)\)$", "", action.help or "")


def _config_path(argv: Sequence[str]) -> str | None:
    # As of any flag that is there twice, the last one counts.
    for index in reversed(range(len(argv))):
        if argv[index] == "--config" and index + 1 < len(argv):
            return argv[index + 1]
        if argv[index].startswith("--config="):
            return argv[index].removeprefix("--config=")
    return os.environ.get(PREFIX + _CONFIG.upper())


def _read_file(path: str) -> dict[str, Any]:
    try:
        values = read_yaml(Path(path)) or {}
    except YamlFileError as error:
        raise ConfigError(f"config: {path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config: {path} must hold settings, name: value")
    # A file of settings names no other.
    unknown = sorted(map(str, values.keys() - (Settings.model_fields.keys() - {_CONFIG})))
    if unknown:
        raise ConfigError(f"config: {path}: unknown setting {unknown[0]}")
    return values


def refuse_unknown_variables(environment: Mapping[str, str]) -> None:
    """Refuse what looks like a setting and is none.

    Raises:
        ConfigError: naming the variable.
    """
    for variable, text in environment.items():
        if not variable.startswith(PREFIX) or is_service_link(variable, text):
            continue
        name, *parts = variable.removeprefix(PREFIX).lower().split(_NESTED)
        field = Settings.model_fields.get(name)
        if field is None or len(parts) > 1 or set(parts) - _nested(field.annotation).keys():
            raise ConfigError(f"unknown setting {variable}")


def _nested(annotation: Any) -> Mapping[str, Any]:
    """The fields of a setting that has settings of its own, such as ``engine`` and ``runner``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.model_fields
    return {}


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _settings_problem(error: SettingsError) -> str:
    text = str(error).splitlines()[0].removeprefix("error parsing CLI: ")
    undecoded = re.match(
        r'(?:error parsing value for field "|Parsing error encountered for )([\w.]+)', text
    )
    return f"{undecoded[1]}: must be JSON" if undecoded else text


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
