"""What the routes need: made once, before the app."""

from dataclasses import dataclass

from server.engine import Engine
from server.image_service import ImageService
from server.keys import Keys
from server.metrics import Metrics
from server.settings import Settings
from server.storage.store import ImageStore


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
