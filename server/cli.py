"""krea2-serve: the images server and its engine, until SIGTERM."""

import asyncio
import logging
import os
import resource
import secrets
import signal
import sys
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

from krea2_srt.cli.errors import USAGE_ERROR, one_line_errors
from krea2_srt.errors import ConfigError
from server.app import create_app
from server.engine_channel import EngineExitedError
from server.engine_client import EngineClient
from server.http_protocol import bounded_protocol
from server.image_service import ImageService
from server.keys import Keys
from server.logs import configure_logs
from server.metrics import Metrics
from server.moderation.moderator import ModerationConfigError, Moderator
from server.rate_limits import RateLimits
from server.services import Services
from server.settings import COMMAND, Settings, load_settings
from server.storage.fsspec_store import FsspecStore
from server.storage.local import LocalStore
from server.storage.store import ImageStore, StorageError
from server.supervisor import EngineStartError, Supervisor, attach_running
from server.tracing import Tracing

logger = logging.getLogger(__name__)

_KEEP_ALIVE_S = 75
"""Longer than the idle connections of usual proxies and clients: they close first."""

_BACKLOG = 4096
_KEY_BYTES = 32
_LAST_ANSWERS_S = 5
_STARTING_S = 0.1


def main(argv: Sequence[str] | None = None) -> None:
    with one_line_errors(COMMAND):
        settings = load_settings(sys.argv[1:] if argv is None else argv)
        keys = Keys.from_settings(settings)
        moderator = _moderator(settings)
    configure_logs(settings.log_level, settings.log_format)
    _raise_file_limit()
    try:
        uvloop.run(serve(settings, keys, moderator))
    except (ConfigError, StorageError, ModerationConfigError, EngineStartError) as error:
        print(f"{COMMAND}: error: {error}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR) from None


async def serve(settings: Settings, keys: Keys, moderator: Moderator | None) -> None:
    """Serve until SIGTERM or SIGINT; what was accepted is finished.

    Raises:
        EngineStartError, StorageError, ModerationConfigError: it cannot serve at all.
    """
    async with AsyncExitStack() as stack:
        count = len(settings.engine_endpoints) or settings.replicas
        engine = EngineClient(count)
        stack.callback(engine.close)
        store = make_store(settings)
        await store.start()
        stack.push_async_callback(store.close)
        if moderator is not None:
            await moderator.start()
            stack.push_async_callback(moderator.close)
        tracing = Tracing(settings.otlp_endpoint)
        stack.callback(tracing.close)
        metrics = Metrics(engine, moderator)
        images = ImageService(engine, RateLimits(), store, moderator, metrics, tracing)
        services = Services(settings, engine, keys, images, store, metrics, int(time.time()))
        server = ImagesServer(services)
        supervisor = Supervisor(settings, engine)
        if not settings.engine_endpoints:
            stack.push_async_callback(supervisor.stop)
        await _until_first_end(
            server.serve(),
            _attach(settings, engine) if settings.engine_endpoints else supervisor.run(),
            _say_when_ready(server, services),
        )


class ImagesServer(uvicorn.Server):
    """uvicorn, with our way of ending.

    Args:
        services: of the app.
    """

    def __init__(self, services: Services) -> None:
        settings = services.settings
        self._services = services
        super().__init__(
            uvicorn.Config(
                create_app(services),
                host=settings.host,
                port=settings.port,
                http=bounded_protocol(
                    settings.max_header_bytes, settings.header_timeout_s, settings.send_timeout_s
                ),
                ws="none",
                loop="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=_BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(settings.drain_timeout_s + _LAST_ANSWERS_S),
            )
        )

    @property
    def address(self) -> str:
        """Where it listens."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In place of uvicorn's, which ends the process by the signal: an orderly end is 0."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, loop)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _end(self, loop: asyncio.AbstractEventLoop) -> None:
        if self.should_exit:
            logger.warning("told twice: ending at once")
            self.force_exit = True
            return
        logger.info("ending; requests under way are finished")
        self._services.images.draining = True
        self.should_exit = True
        # Nobody should wait without an answer: those that are not done by then get an error.
        timeout_s = self._services.settings.drain_timeout_s
        loop.call_later(timeout_s, self._services.engine.detach_all)


def make_store(settings: Settings) -> ImageStore:
    """Where images with URLs go.

    Raises:
        StorageError: the folder for the signing key cannot be made.
    """
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
    )


def _signing_key(settings: Settings, folder: Path) -> bytes:
    """The configured one, or one that is made once and kept beside the images."""
    if configured := settings.storage_key.get_secret_value():
        return configured.encode()
    file = folder.with_name(folder.name + ".key")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            if len(key := file.read_bytes()) == _KEY_BYTES:
                return key
            raise StorageError(f"storage_key: {file} is damaged; remove it") from None
        with os.fdopen(descriptor, "wb") as new:
            new.write(key := secrets.token_bytes(_KEY_BYTES))
        return key
    except OSError as error:
        raise StorageError(f"storage: {file}: {error.strerror}") from None


def _moderator(settings: Settings) -> Moderator | None:
    if settings.moderation_policy is None:
        return None
    try:
        return Moderator.from_file(settings.moderation_policy)
    except ModerationConfigError as error:
        raise ConfigError(f"moderation_policy: {error}") from None


async def _attach(settings: Settings, engine: EngineClient) -> None:
    try:
        await attach_running(settings.engine_endpoints, engine)
    except (TimeoutError, EngineExitedError) as error:
        raise EngineStartError(f"engine_endpoints: no answer: {error}") from None
    await asyncio.Event().wait()


async def _say_when_ready(server: ImagesServer, services: Services) -> None:
    while not server.started:
        await asyncio.sleep(_STARTING_S)
    address, name = server.address, services.settings.model_name
    logger.info("listening at %s; the model is being loaded", address)
    while not services.engine.ready:
        await asyncio.sleep(_STARTING_S)
    logger.info("ready: %s at %s", name, address)
    print(
        f"""
{name} is ready. Try:

  curl {address}/v1/images/generations -H 'content-type: application/json' \\
    -d '{{"prompt": "a red fox in fresh snow", "size": "512x512", "response_format": "url"}}'
""",
        flush=True,
    )
    if services.settings.playground:
        print(f"  playground: {address}/\n", flush=True)
    await asyncio.Event().wait()


async def _until_first_end(*work: Coroutine[Any, Any, None]) -> None:
    """Run all; when the first ends, end the others, and raise what it raised."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            try:
                task.result()
            except BaseExceptionGroup as group:
                # A task group's; the first failure says it all.
                raise group.exceptions[0] from None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _raise_file_limit() -> None:
    """Every waiting client is an open file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    main()
