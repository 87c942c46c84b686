"""One scheduler process, as the HTTP process sees it: messages over SGLang's channel."""

import asyncio
import io
import itertools
import logging
import pickle
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from krea2_server.engine.base import JobMessages, Message
from krea2_server.errors import from_engine
from krea2_srt.messages import (
    Accepted,
    AdapterInfo,
    Cancel,
    Command,
    ControlReply,
    ControlRequest,
    EngineError,
    Generated,
    GenerateRequest,
    GetAdapters,
    GetModel,
    GetStatistics,
    LoadAdapter,
    ModelInfo,
    ProgressUpdate,
    SetAdapterNames,
    UnloadAdapter,
)

logger = logging.getLogger(__name__)

_PACKAGES = ("krea2_srt", "numpy", "builtins")
"""Whose types are in messages to us. What else the scheduler may send belongs to SGLang, and would
be imported for it, with torch, for a minute."""


class EngineExitedError(Exception):
    """The scheduler process has gone with the request."""


class EngineChannel:
    """All requests to one scheduler, over one DEALER socket.

    Args:
        context: of ZeroMQ.
        endpoint: where the scheduler listens. It is trusted: what it sends is unpickled.

    Raises:
        EngineExitedError: that is no endpoint.
    """

    def __init__(self, context: zmq.asyncio.Context, endpoint: str) -> None:
        self.endpoint = endpoint
        self._socket = context.socket(zmq.DEALER)
        self._socket.linger = 0
        # No limits: beyond one, ZeroMQ would drop messages without a word.
        self._socket.set_hwm(0)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self._close_sockets()
            raise EngineExitedError(f"{endpoint} cannot be connected to: {error}") from None
        self._jobs: dict[str, ChannelJob] = {}
        self._replies: dict[str, asyncio.Future[ControlReply]] = {}
        self._numbers = itertools.count()
        self._reader = asyncio.create_task(self._read())

    async def submit(self, message: GenerateRequest) -> "ChannelJob":
        """Have a request generated; see `Engine.submit`.

        Raises:
            ApiError: the scheduler refuses it.
            EngineExitedError: the scheduler has gone.
        """
        job = ChannelJob(self, message.request_id)
        try:
            await self._send(message)
        except BaseException:
            job.close()
            raise
        return await job.until_accepted()

    def add(self, job: "ChannelJob") -> None:
        """Give a job what comes for its request."""
        self._jobs[job.request_id] = job

    def remove(self, job: "ChannelJob", cancel: bool) -> None:
        """Nobody listens to it any more.

        Args:
            cancel: whether its request is still in the scheduler.
        """
        self._jobs.pop(job.request_id, None)
        if cancel and not self._socket.closed:
            # Nothing may be awaited where one is cancelled: without a limit it is sent at once.
            self._socket.send_multipart([b"", pickle.dumps(Cancel(job.request_id))])

    async def model(self, timeout_s: float) -> ModelInfo:
        """What is served there.

        Raises:
            TimeoutError: no answer.
            EngineExitedError: the scheduler has gone meanwhile.
        """
        answer = await self._control(GetModel(), timeout_s)
        if not isinstance(answer, ModelInfo):
            raise EngineExitedError(f"{self.endpoint} is not a scheduler of krea2-srt")
        return answer

    async def statistics(self, timeout_s: float) -> dict[str, Any]:
        """What the engine says of itself; raises as `model` does."""
        answer = await self._control(GetStatistics(), timeout_s)
        assert isinstance(answer, dict)
        return answer

    async def adapters(self, timeout_s: float) -> tuple[AdapterInfo, ...]:
        """The adapters that it serves; raises as `model` does."""
        answer = await self._control(GetAdapters(), timeout_s)
        assert isinstance(answer, tuple)
        return answer

    async def load_adapter(self, name: str, path: str, timeout_s: float) -> AdapterInfo:
        """Have an adapter read and served.

        Raises:
            ApiError: it cannot be.
            TimeoutError, EngineExitedError: as `model`.
        """
        answer = await self._control(LoadAdapter(name, path), timeout_s)
        assert isinstance(answer, AdapterInfo)
        return answer

    async def unload_adapter(self, name: str, timeout_s: float) -> None:
        """Have one served no more; raises as `load_adapter` does."""
        await self._control(UnloadAdapter(name), timeout_s)

    async def set_adapter_names(self, names: SetAdapterNames, timeout_s: float) -> None:
        """Have these served, and no others by hand; raises as `model` does."""
        await self._control(names, timeout_s)

    async def disconnected(self) -> None:
        """Return when the connection to the scheduler is lost."""
        await recv_monitor_message(self._monitor)

    def close(self, reason: str = "the engine has exited") -> None:
        """End all that is under way; nothing comes or goes any more.

        Args:
            reason: what its clients are told.
        """
        if self._socket.closed:
            return
        self._reader.cancel()
        self._close_sockets()
        for job in self._jobs.values():
            job.put(EngineExitedError(reason))
        for future in self._replies.values():
            if not future.done():
                future.set_exception(EngineExitedError(reason))

    def _close_sockets(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close()

    async def _control(self, command: Command, timeout_s: float) -> Any:
        control_id = self._control_id()
        future = asyncio.get_running_loop().create_future()
        self._replies[control_id] = future
        try:
            await self._send(ControlRequest(control_id, command))
            async with asyncio.timeout(timeout_s):
                answer = await future
        finally:
            del self._replies[control_id]
        if isinstance(answer.error, EngineError):
            raise from_engine(answer.error)
        if answer.error is not None:
            raise EngineExitedError(answer.error)
        return answer.output

    def _control_id(self) -> str:
        return f"control-{next(self._numbers)}"

    async def _send(self, message: object) -> None:
        if self._socket.closed:
            raise EngineExitedError("the engine has exited")
        await self._socket.send_multipart([b"", pickle.dumps(message)])

    async def _read(self) -> None:
        while True:
            frames = await self._socket.recv_multipart(copy=False)
            try:
                self._deliver(_Unpickler(io.BytesIO(frames[-1].buffer)).load())
            except Exception:
                logger.exception("a message from %s cannot be read", self.endpoint)

    def _deliver(self, message: object) -> None:
        match message:
            case ControlReply(control_id):
                future = self._replies.get(control_id)
                if future is not None and not future.done():
                    future.set_result(message)
            case Accepted(request_id) | ProgressUpdate(request_id) | Generated(request_id):
                if (job := self._jobs.get(request_id)) is not None:
                    job.put(message)
            case _:
                logger.warning("%s sent a %s", self.endpoint, type(message).__name__)


class ChannelJob(JobMessages):
    """A request on its way to a scheduler, or there; as `Job`, but for its place in the queue.

    Args:
        channel: to the scheduler.
        request_id: of the request.
    """

    def __init__(self, channel: EngineChannel, request_id: str) -> None:
        self.request_id = request_id
        self._channel = channel
        self._messages: asyncio.Queue[Message | EngineExitedError] = asyncio.Queue()
        self._closed = False
        channel.add(self)

    def put(self, message: Message | EngineExitedError) -> None:
        """A message has come, or nothing will come any more."""
        self._messages.put_nowait(message)

    async def receive(self) -> Message:
        """The next message.

        Raises:
            EngineExitedError: the scheduler has gone.
        """
        message = await self._messages.get()
        self._ended = isinstance(message, Generated | EngineExitedError)
        if isinstance(message, EngineExitedError):
            raise message
        return message

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._channel.remove(self, cancel=not self._ended)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] not in _PACKAGES:
            raise pickle.UnpicklingError(f"{module}.{name} is in no message to us")
        return super().find_class(module, name)
