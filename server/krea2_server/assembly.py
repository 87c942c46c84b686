"""What a server needs, made from its settings and ended in order."""

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from krea2_server.api.images import FILES_PATH
from krea2_server.engine.base import Engine
from krea2_server.image_service import ImageService
from krea2_server.keys import Keys
from krea2_server.middleware.rate_limits import RateLimits
from krea2_server.moderation.moderator import ModerationConfigError, Moderator
from krea2_server.observability.metrics import Metrics
from krea2_server.observability.tracing import Tracing
from krea2_server.services import Services
from krea2_server.settings import NO_STORAGE, Settings
from krea2_server.storage.fsspec_store import FsspecStore
from krea2_server.storage.local import LocalStore
from krea2_server.storage.permissions import private_mode
from krea2_server.storage.store import ImageStore, StorageError
from krea2_srt.errors import ConfigError

_KEY_BYTES = 32


@asynccontextmanager
async def create_services(
    settings: Settings, keys: Keys, moderator: Moderator | None, engine: Engine
) -> AsyncIterator[Services]:
    """The services of an app, started.

    Args:
        engine: generates; somebody else's to end.

    Raises:
        StorageError, ModerationConfigError: they cannot be started.
    """
    async with AsyncExitStack() as stack:
        store = _make_store(settings)
        if store is not None:
            await store.start()
            stack.push_async_callback(store.close)
        if moderator is not None:
            await moderator.start()
            stack.push_async_callback(moderator.close)
        tracing = Tracing(settings.otlp_endpoint)
        # In a thread: a collector that is away is waited for.
        stack.push_async_callback(asyncio.to_thread, tracing.close)
        metrics = Metrics(engine, moderator)
        images = ImageService(engine, RateLimits(), store, moderator, metrics, tracing)
        yield Services(settings, engine, keys, images, store, metrics, int(time.time()))


def load_moderator(settings: Settings) -> Moderator | None:
    """What checks content; None checks nothing.

    Raises:
        ConfigError: its policy is wrong.
    """
    if settings.moderation_policy is None:
        return None
    try:
        return Moderator.from_file(settings.moderation_policy)
    except ModerationConfigError as error:
        raise ConfigError(f"moderation_policy: {error}") from None


def _make_store(settings: Settings) -> ImageStore | None:
    """Where images with URLs go; None where there are no URLs.

    Raises:
        StorageError: the folder for the signing key cannot be made.
    """
    if settings.storage == NO_STORAGE:
        return None
    if "://" in settings.storage:
        return FsspecStore(
            settings.storage, expiry_s=settings.url_expiry_s, options=settings.storage_options
        )
    folder = settings.storage_folder
    return LocalStore(
        folder,
        signing_key=_signing_key(settings, folder),
        expiry_s=settings.url_expiry_s,
        max_bytes=settings.max_storage_bytes,
        path=FILES_PATH,
    )


def _signing_key(settings: Settings, folder: Path) -> bytes:
    """The configured one, or one that is made once and kept beside the images."""
    if configured := settings.storage_key.get_secret_value():
        return configured.encode()
    file = folder.with_name(folder.name + ".key")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            mode = private_mode(file.parent, 0o600)
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        except FileExistsError:
            if len(key := file.read_bytes()) == _KEY_BYTES:
                return key
            raise StorageError(f"storage_key: {file} is damaged; remove it") from None
        with os.fdopen(descriptor, "wb") as new:
            new.write(key := secrets.token_bytes(_KEY_BYTES))
        return key
    except OSError as error:
        raise StorageError(f"storage: {file}: {error.strerror}") from None
