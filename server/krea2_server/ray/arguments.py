"""The application's arguments, as `serve run` and Serve's configuration files give them."""

import os
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_settings import PydanticBaseSettingsSource

from krea2_server.settings import NO_STORAGE, Settings, refuse_unknown_variables
from krea2_srt.errors import ConfigError

_OF_RAY = (
    ("host", "http_options.host of Ray Serve"),
    ("port", "http_options.port of Ray Serve"),
    ("address_file", "nothing"),
    ("replicas", "max_replicas"),
    ("engine_endpoints", "nothing"),
    ("max_header_bytes", "nothing"),
    ("header_timeout_s", "nothing"),
    ("send_timeout_s", "nothing"),
    ("plan", "nothing"),
    ("gpu", "nothing"),
)
"""Settings that have no effect, and what has: Ray Serve's own server is in front."""


class RaySettings(Settings):
    """krea2-serve's settings: what the application is told comes before the environment.

    An image has variables of its own, and they are krea2-serve's there.
    """

    @classmethod
    def settings_customise_sources(
        cls, *args: Any, **sources: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return super().settings_customise_sources(*args, **sources)[::-1]


class Arguments(BaseModel):
    """Arguments of `krea2_server.ray.app:build`. Unknown ones are errors.

    Attributes:
        settings: of krea2-serve, as in its YAML file.
        min_replicas, max_replicas: engines; each takes its GPUs and CPUs.
        target_queue_s: seconds of estimated work for each engine, beyond which there should be
            more of them.
        upscale_delay_s, downscale_delay_s: for how long that must be so.
        gpus, cpus: of an engine. Ray gives PyTorch as many threads as CPUs.
        http_replicas: processes that check, limit, store and answer. Limits of keys and metrics
            are each one's own, so 1 is best as long as it is enough: hundreds of images a second.
    """

    model_config = ConfigDict(extra="forbid")

    settings: dict[str, Any] = {}
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    target_queue_s: float = Field(10.0, gt=0)
    upscale_delay_s: float = Field(10.0, ge=0)
    downscale_delay_s: float = Field(300.0, ge=0)
    gpus: float = Field(1, ge=0)
    cpus: float = Field(4, gt=0)
    http_replicas: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _check(self) -> "Arguments":
        if self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas: must be at least min_replicas")
        try:
            refuse_unknown_variables(os.environ)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        for name, instead in _OF_RAY:
            if name in self.settings:
                raise ValueError(f"settings.{name}: has no effect here; {instead} has")
        settings = self.server_settings()
        if settings.config is not None:
            raise ValueError("settings.config: has no effect here; give the settings themselves")
        # Ray Serve listens where it is told to: as if that were all addresses.
        if not settings.has_keys and not settings.allow_anonymous:
            raise ValueError(
                "settings: there are no API keys; give api_keys_file, or allow_anonymous if that "
                "is meant"
            )
        folder = settings.storage != NO_STORAGE and "://" not in settings.storage
        if folder and self.http_replicas > 1:
            raise ValueError("settings.storage: a folder is one HTTP process's; use s3://")
        return self

    def values(self) -> dict[str, Any]:
        """Values of `RaySettings`. Without a storage there are no URLs: replicas move."""
        return {"storage": NO_STORAGE, **self.settings}

    def server_settings(self) -> Settings:
        return RaySettings(**self.values())
