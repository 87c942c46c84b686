"""What the routes need: made once, before the app."""

from dataclasses import dataclass

from server.engine_client import EngineClient
from server.image_service import ImageService
from server.keys import Keys
from server.metrics import Metrics
from server.settings import Settings
from server.storage.store import ImageStore


@dataclass(frozen=True)
class Services:
    """Attributes are the classes of their names."""

    settings: Settings
    engine: EngineClient
    keys: Keys
    images: ImageService
    store: ImageStore | None
    metrics: Metrics
    started: int
    """Unix time in seconds."""
