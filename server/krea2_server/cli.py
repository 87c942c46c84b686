"""krea2-serve: the images server and its engine, until SIGTERM."""

import asyncio
import gc
import json
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

from krea2_server.api.quality import PRESETS, automatic_size
from krea2_server.app import create_app
from krea2_server.assembly import create_services, load_moderator
from krea2_server.engine.client import EngineClient
from krea2_server.engine.supervisor import EngineStartError, Supervisor, attach_running
from krea2_server.http_protocol import bounded_protocol
from krea2_server.keys import Keys
from krea2_server.moderation.moderator import ModerationConfigError, Moderator
from krea2_server.observability.logs import configure_logs
from krea2_server.plan import plan_text
from krea2_server.proxies.public_address import url_warning
from krea2_server.services import Services
from krea2_server.settings import COMMAND, NO_STORAGE, Settings, load_settings
from krea2_server.storage.store import StorageError
from krea2_srt.cli.errors import USAGE_ERROR, one_line_errors
from krea2_srt.errors import ConfigError
from krea2_srt.messages import ModelInfo
from krea2_srt.model.parts import check_on_disk

logger = logging.getLogger(__name__)

_KEEP_ALIVE_S = 75
"""Longer than the idle connections of usual proxies and clients: they close first."""

_BACKLOG = 4096
_LAST_ANSWERS_S = 5
_POLL_S = 0.1


def main(argv: Sequence[str] | None = None) -> None:
    with one_line_errors(COMMAND):
        settings = load_settings(sys.argv[1:] if argv is None else argv)
        if settings.plan:
            print(plan_text(settings))
            return
        keys = Keys.from_settings(settings)
        moderator = load_moderator(settings)
        _check_model(settings)
    configure_logs(settings.log_level, settings.log_format)
    _raise_file_limit()
    try:
        uvloop.run(serve(settings, keys, moderator))
    except (ConfigError, StorageError, ModerationConfigError, EngineStartError) as error:
        print(f"{COMMAND}: error: {error}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR) from None
    except asyncio.CancelledError:
        pass  # by a signal, before there was anything to end


async def serve(settings: Settings, keys: Keys, moderator: Moderator | None) -> None:
    """Serve until SIGTERM or SIGINT; what was accepted is finished.

    Raises:
        ConfigError, EngineStartError, StorageError, ModerationConfigError: it cannot serve.
    """
    async with AsyncExitStack() as stack:
        signals = stack.enter_context(SignalHandler())
        listener = stack.enter_context(_listen(settings))
        stack.enter_context(_address_told(settings.address_file, address_of(listener)))
        count = len(settings.engine_endpoints) or settings.replicas
        engine = EngineClient(count)
        stack.callback(engine.close)
        services = await stack.enter_async_context(
            create_services(settings, keys, moderator, engine)
        )
        server, supervisor = ImagesServer(services, engine), Supervisor(settings, engine)
        signals.started(server, supervisor)
        # What is there by now stays: the collector need not look at it during requests.
        gc.collect()
        gc.freeze()
        await _until_first_end(
            server.serve([listener]),
            _run_engines(settings, engine, supervisor),
            _say_when_ready(address_of(listener), services),
        )


class ImagesServer(uvicorn.Server):
    """uvicorn, with our way of ending.

    Args:
        services: of the app.
        engine: theirs.
    """

    def __init__(self, services: Services, engine: EngineClient) -> None:
        settings = services.settings
        self._services = services
        self._engine = engine
        super().__init__(
            uvicorn.Config(
                create_app(services),
                http=bounded_protocol(
                    settings.max_header_bytes, settings.header_timeout_s, settings.send_timeout_s
                ),
                ws="none",
                loop="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                # Whom to believe is `trusted_proxies`' affair alone.
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(settings.drain_timeout_s + _LAST_ANSWERS_S),
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In place of uvicorn's, which ends the process by the signal: `SignalHandler` has them."""
        yield

    def drain(self) -> None:
        """Take nothing new, and end when what was accepted is finished."""
        self._services.images.draining = True
        self.should_exit = True
        # Nobody should wait without an answer: those that are not done by then get an error.
        timeout_s = self._services.settings.drain_timeout_s
        asyncio.get_running_loop().call_later(timeout_s, self.give_up)

    def give_up(self) -> None:
        """Answer what is not finished with an error."""
        self._engine.detach_all("the server has shut down before the image was done")


class SignalHandler:
    """What SIGTERM and SIGINT do, from the first moment to the last.

    The first signal ends the server in order, with exit code 0; the second at once.
    """

    def __init__(self) -> None:
        self._task = asyncio.current_task()
        self._server: ImagesServer | None = None
        self._supervisor: Supervisor | None = None

    def started(self, server: ImagesServer, supervisor: Supervisor) -> None:
        """There is something now that has to end in order."""
        self._server, self._supervisor = server, supervisor

    def __enter__(self) -> "SignalHandler":
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._end)
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)

    def _end(self) -> None:
        if self._server is None or self._supervisor is None:
            assert self._task is not None
            self._task.cancel()
        elif self._server.should_exit:
            logger.warning("second signal: exiting now")
            self._server.force_exit = True
            self._server.give_up()
            self._supervisor.kill()
        else:
            logger.info("ending when the requests under way are finished")
            self._server.drain()


def _check_model(settings: Settings) -> None:
    """What is not there can be told at once, and not after the minute that an engine takes."""
    if not settings.engine_endpoints:
        check_on_disk(settings.source)


async def _run_engines(settings: Settings, engine: EngineClient, supervisor: Supervisor) -> None:
    if settings.engine_endpoints:
        await attach_running(settings, engine)
        return
    try:
        await supervisor.run()
    finally:
        await supervisor.stop()


def _listen(settings: Settings) -> socket.socket:
    """Before anything is loaded: what cannot be reached needs no model."""
    host, port = settings.host, settings.port
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError) as error:
        # Names that cannot be are Python's to refuse, before any resolver sees them.
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"host, port: {host}:{port} cannot be listened on: {reason}") from None


def address_of(listener: socket.socket) -> str:
    """The URL of a socket that listens."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def on_this_machine(address: str) -> str:
    """An address as this machine asks it: who listens on all is reached by loopback."""
    return address.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


@contextmanager
def _address_told(file: Path | None, address: str) -> Iterator[None]:
    """While it runs, the address is in the file, if there is to be one."""
    if file is None:
        yield
        return
    if not file.name:
        raise ConfigError(f"address_file: {file}: must be the name of a file")
    partial, text = file.with_name(f"{file.name}.{os.getpid()}"), on_this_machine(address) + "\n"
    try:
        partial.write_text(text)
        partial.replace(file)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise ConfigError(f"address_file: {file}: {error.strerror}") from None
    try:
        yield
    finally:
        with suppress(OSError, ValueError):
            if file.read_text() == text:  # and not what a later server has put there
                file.unlink()


async def _say_when_ready(address: str, services: Services) -> None:
    settings, engine = services.settings, services.engine
    logger.info("listening at %s; the model is being loaded", address)
    if warning := url_warning(settings):
        logger.warning(warning)
    while engine.model is None or not engine.num_ready:
        await asyncio.sleep(_POLL_S)
    name = services.names.own
    logger.info("ready: %s at %s", name, address)
    print(usage(address, name, settings, engine.model), flush=True)
    await asyncio.Event().wait()


def usage(address: str, name: str, settings: Settings, model: ModelInfo) -> str:
    """What to do with a server that is ready.

    Args:
        name: of the model.
    """
    address = on_this_machine(address)
    width, height = automatic_size(PRESETS["low"], model)
    body = {"prompt": "a red heart on a yellow background", "size": f"{width}x{height}"}
    if settings.storage != NO_STORAGE:
        body["response_format"] = "url"
    key = ' -H "authorization: Bearer $KEY"' if settings.has_keys else ""
    playground = f"  playground: {address}/\n" if settings.playground else ""
    return f"""
{name} is ready. Try:

  curl {address}/v1/images/generations{key} -H 'content-type: application/json' \\
    -d '{json.dumps(body)}'

{playground}"""


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
