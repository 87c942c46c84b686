"""Settings from environment variables."""

from collections.abc import Mapping

from pydantic_settings import EnvSettingsSource

from krea2_srt.service_links import is_service_link


class Variables(EnvSettingsSource):
    """The environment, but for Kubernetes' service links."""

    def _load_env_vars(self) -> Mapping[str, str | None]:
        # In small letters there.
        return {
            variable: value
            for variable, value in super()._load_env_vars().items()
            if value is None or not is_service_link(variable.upper(), value)
        }
