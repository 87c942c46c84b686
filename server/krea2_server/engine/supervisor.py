"""Starts the engine's processes, one for each replica, and starts the dead ones anew."""

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import time
from contextlib import suppress

from krea2_server.engine.channel import EngineExitedError
from krea2_server.engine.client import EngineClient
from krea2_server.model_names import name_of
from krea2_server.settings import Settings, visible_gpus
from krea2_srt.cli.errors import USAGE_ERROR
from krea2_srt.messages import ModelInfo
from krea2_srt.model.parts import CheckpointSource
from krea2_srt.model.releases import CLASS_NAME
from krea2_srt.threads import limit_spinning

logger = logging.getLogger(__name__)

MAX_FIRST_STARTS = 3
"""Failed starts of an engine that has never run, after which it is not tried again."""

_BACKOFF_S = (1.0, 2.0, 5.0, 10.0, 30.0)
_LONG_RUN_S = 60.0
"""After that long a run, a death is a new story: the next start comes at once."""

_TERMINATE_S = 30.0
_WATCH_S = 1.0
_MAX_LINE = 2**20


class EngineStartError(Exception):
    """An engine cannot be started; trying again would not help."""


class EngineProcess:
    """One replica's process, whichever is the current one.

    Args:
        index: of the replica, and of its GPU among those that we may use.
        settings: what to run.
        client: told of its coming and going.
    """

    def __init__(self, index: int, settings: Settings, client: EngineClient) -> None:
        self.index = index
        self._settings = settings
        self._client = client
        self._process: asyncio.subprocess.Process | None = None
        self._stop = asyncio.Event()
        self._ready_at: float | None = None

    async def run(self) -> None:
        """Start it, wait for its end, and so on, until `stop`.

        Raises:
            EngineStartError: it has never run, and will not.
        """
        failures, has_run = 0, False
        while True:
            self._ready_at = None
            code = await self._run_once()
            if self._stop.is_set():
                return
            has_run |= self._ready_at is not None
            if not has_run:
                failures += 1
                if code == USAGE_ERROR or failures >= MAX_FIRST_STARTS:
                    raise EngineStartError(
                        f"engine {self.index} does not start (exit code {code}); its own "
                        "messages are above"
                    )
            else:
                failures = 1 if self._ran_long() else failures + 1
            wait_s = 0.0 if failures == 1 else _BACKOFF_S[min(failures - 2, len(_BACKOFF_S) - 1)]
            logger.error(
                "engine %d has exited with code %s; starting it again in %.0f s",
                self.index,
                code,
                wait_s,
            )
            await asyncio.sleep(wait_s)

    async def stop(self) -> None:
        """End it in order, or if it does not, at once."""
        self._stop.set()
        process = self._process
        if process is None or process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(_TERMINATE_S):
                await process.wait()
        except TimeoutError:
            logger.warning("engine %d does not end; killing it", self.index)
            self._kill(process)
            await process.wait()

    def _ran_long(self) -> bool:
        return self._ready_at is not None and time.monotonic() - self._ready_at > _LONG_RUN_S

    def kill(self) -> None:
        """End it at once."""
        self._stop.set()
        if self._process is not None and self._process.returncode is None:
            self._kill(self._process)

    async def _run_once(self) -> int:
        """Returns the exit code, negative for a signal."""
        reader, writer = os.pipe()
        with_logs = self._settings.log_format == "json"
        try:
            process = await asyncio.create_subprocess_exec(
                *worker_command(self._settings, writer),
                pass_fds=[writer],
                env=worker_environment(self._settings, self.index),
                stdout=asyncio.subprocess.PIPE if with_logs else None,
                stderr=asyncio.subprocess.STDOUT if with_logs else None,
                limit=_MAX_LINE,
            )
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        self._process = process
        logger.info("engine %d: starting, process %d", self.index, process.pid)
        tasks = [asyncio.create_task(self._watch(process, reader))]
        if with_logs:
            tasks.append(asyncio.create_task(self._relay_logs(process)))
        try:
            return await process.wait()
        finally:
            self._client.detach(self.index)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self, process: asyncio.subprocess.Process, reader: int) -> None:
        started, line = time.monotonic(), ""
        try:
            async with asyncio.timeout(self._settings.start_timeout_s):
                line = await _read_line(reader)
                # An empty one, of a process that dies, or is no use alive.
                await self._client.attach(self.index, json.loads(line)["endpoint"])
        except Exception as error:
            if line or isinstance(error, TimeoutError):
                reason = str(error) or f"no word in {self._settings.start_timeout_s:g} s"
                logger.error("engine %d is not ready: %s; killing it", self.index, reason)
            self._kill(process)
            return
        self._ready_at = time.monotonic()
        logger.info("engine %d: ready after %.1f s", self.index, self._ready_at - started)
        await _until_silent(self._client, self.index, self._settings.hang_timeout_s)
        logger.error("engine %d does not answer; killing it", self.index)
        self._kill(process)

    async def _relay_logs(self, process: asyncio.subprocess.Process) -> None:
        """The engine's lines as ours, so that all of the log has one format."""
        assert process.stdout is not None
        engine_logger = logging.getLogger(f"engine.{self.index}")
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:  # longer than the limit; asyncio has thrown it away
                continue
            if not line:
                return
            if text := line.decode(errors="replace").strip():
                engine_logger.info(text)

    def _kill(self, process: asyncio.subprocess.Process) -> None:
        with suppress(ProcessLookupError):
            process.kill()
        with suppress(ProcessLookupError):
            # Its group is its own: what it has started goes with it.
            os.killpg(process.pid, signal.SIGKILL)


class Supervisor:
    """All replicas' processes.

    Args:
        settings: how many, and what they run.
        client: told of their coming and going.
    """

    def __init__(self, settings: Settings, client: EngineClient) -> None:
        self._processes = [
            EngineProcess(index, settings, client) for index in range(settings.replicas)
        ]

    async def run(self) -> None:
        """Keep all of them running, until `stop`.

        Raises:
            EngineStartError: one of them cannot be started.
        """
        async with asyncio.TaskGroup() as group:
            for process in self._processes:
                group.create_task(process.run())

    def kill(self) -> None:
        """End all of them at once, while `stop` still waits for them."""
        for process in self._processes:
            process.kill()

    async def stop(self) -> None:
        await asyncio.gather(*(process.stop() for process in self._processes))


async def attach_running(settings: Settings, client: EngineClient) -> None:
    """Use schedulers that somebody else starts and looks after: whenever one is there.

    Raises:
        EngineStartError: they serve different models, and there has been no request yet.
    """
    async with asyncio.TaskGroup() as group:
        for index in range(len(settings.engine_endpoints)):
            group.create_task(_keep_attached(index, settings, client))


class _OtherModelError(Exception):
    """An engine serves another model than those that are there."""


async def _keep_attached(index: int, settings: Settings, client: EngineClient) -> None:
    endpoint = settings.engine_endpoints[index]

    def check(model: ModelInfo) -> None:
        served = client.model if client.routing.live else None
        if served is not None and _identity(model, settings) != _identity(served, settings):
            raise _OtherModelError(
                f"engine_endpoints: {endpoint} serves {_described(model)}, and the engines before "
                f"it {_described(served)}; all must serve one model"
            )

    while True:
        try:
            await client.attach(index, endpoint, check)
        except (TimeoutError, EngineExitedError) as error:
            logger.warning("engine %d: no answer from %s: %s", index, endpoint, error)
            await asyncio.sleep(_WATCH_S)
            continue
        except _OtherModelError as error:
            if not client.was_asked:
                raise EngineStartError(str(error)) from None
            # A rollout, perhaps, that began here: the others go on.
            logger.error("%s; it gets no requests", error)
            await asyncio.sleep(_WATCH_S)
            continue
        logger.info("engine %d: at %s", index, endpoint)
        ends = [
            asyncio.create_task(client.disconnected(index)),
            asyncio.create_task(_until_silent(client, index, settings.hang_timeout_s)),
        ]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            client.detach(index)
            for end in ends:
                end.cancel()
            await asyncio.gather(*ends, return_exceptions=True)
        logger.error("engine %d at %s has gone; waiting for it", index, endpoint)


async def _until_silent(client: EngineClient, index: int, hang_timeout_s: float) -> None:
    while client.silent_s(index) < hang_timeout_s:
        await asyncio.sleep(_WATCH_S)


def _identity(model: ModelInfo, settings: Settings) -> tuple[object, ...]:
    """What is the same of two engines with one model; who names the model himself answers for it
    that folders of other names hold the same.
    """
    name = settings.served_model_name or name_of(model.path)
    return name, model.distilled, model.default_steps, model.default_guidance, model.limits


def _described(model: ModelInfo) -> str:
    kind, limits = "Turbo" if model.distilled else "Raw", model.limits
    return f"{model.path} ({kind}, {limits.max_side} and {limits.max_pixels} pixels at most)"


def worker_command(settings: Settings, ready_fd: int) -> list[str]:
    """What starts a scheduler process; see `krea2_srt.sglang.worker`."""
    return [
        *(sys.executable, "-m", "krea2_srt.sglang.worker", "--ready-fd", str(ready_fd)),
        *("--parent-pid", str(os.getpid())),
        *("--model-path", os.path.expanduser(settings.model_path), "--host", "127.0.0.1"),
        # Left alone, schedulers that start together may choose the same port; the other is one that
        # SGLang looks for and a scheduler does not use.
        *("--scheduler-port", str(_free_port()), "--port", str(_free_port())),
        *_parts(settings.source),
        *settings.sglang_options,
    ]


def _parts(source: CheckpointSource) -> list[str]:
    """SGLang's options for the parts of a checkpoint."""
    given = source.given.items()
    return [
        # Without it SGLang takes no single file, and no folder without some of its parts.
        *("--pipeline-class-name", CLASS_NAME),
        *(f"--{part.replace('_', '-')}-path={os.path.expanduser(path)}" for part, path in given),
    ]


def worker_environment(settings: Settings, index: int) -> dict[str, str]:
    """Environment of replica ``index``: the engine's settings, how its threads wait, and one GPU of
    those that we may use.
    """
    environment = {**os.environ, **settings.scheduler_environment}
    limit_spinning(environment)
    visible = visible_gpus()
    if visible or settings.replicas > 1:
        environment["CUDA_VISIBLE_DEVICES"] = visible[index] if visible else str(index)
    return environment


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


async def _read_line(descriptor: int) -> str:
    """The first line that comes out of a pipe, or what there is of it; closes the pipe.

    Not as a transport: those of uvloop close a descriptor that is ours to close, and by then it
    may be somebody else's.
    """
    loop = asyncio.get_running_loop()
    os.set_blocking(descriptor, False)
    readable = asyncio.Event()
    loop.add_reader(descriptor, readable.set)
    line = b""
    try:
        while not line.endswith(b"\n"):
            await readable.wait()
            readable.clear()
            with suppress(BlockingIOError):
                if not (chunk := os.read(descriptor, _MAX_LINE)):
                    break
                line += chunk
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
    return line.decode()
