"""What the routes need: made once, before the app."""

from dataclasses import dataclass

from krea2_server.api.spelling import shown
from krea2_server.engine.base import Engine
from krea2_server.errors import ApiError
from krea2_server.image_service import ImageService
from krea2_server.keys import Keys
from krea2_server.model_names import ModelNames
from krea2_server.observability.metrics import Metrics
from krea2_server.settings import Settings
from krea2_server.storage.store import ImageStore


@dataclass(frozen=True)
class Services:
    """What their names say.

    Attributes:
        store: None where no image gets a URL.
        started: Unix time in seconds.
    """

    settings: Settings
    engine: Engine
    keys: Keys
    images: ImageService
    store: ImageStore | None
    metrics: Metrics
    started: int

    @property
    def names(self) -> ModelNames:
        """What clients call the model that is served now."""
        return ModelNames.of(self.settings, self.engine.model)

    def check_model(self, name: str, param: str = "model") -> str | None:
        """Check that a client may call the model that.

        Args:
            param: the field in which it does.

        Returns:
            The adapter that it names behind the model's name and a colon; None if none.

        Raises:
            ApiError: 404, it may not; 503, what is served is not known yet.
        """
        names = self.names
        if names.serves(name):
            return None
        if not names.known:
            raise self.engine.unavailable()
        if (adapter := names.adapter_in(name)) is not None:
            return adapter
        text = f"{param}: {shown(name)} is not served here; {names.own} is"
        raise ApiError(404, text, "model_not_found", param)
