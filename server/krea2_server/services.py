"""What the routes need: made once, before the app."""

from dataclasses import dataclass

from krea2_server.engine.base import Engine
from krea2_server.image_service import ImageService
from krea2_server.keys import Keys
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
