"""A scheduler without a model: the real channel and messages, pictures of any size at any time.

For what can only be tested, or measured, when the engine does as it is told. What it says is what
`krea2_srt.sglang.scheduler` says; the tests on the real engine hold the two together.

``python -m krea2_srt.testing.fake_engine --picture-bytes N`` prints where it listens, and answers
at once until its standard input is closed.
"""

import argparse
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import zmq
from numpy.typing import NDArray

from krea2_srt.errors import AdapterError, Krea2Error, UnknownAdapterError
from krea2_srt.images import encode_image
from krea2_srt.infotext import infotext
from krea2_srt.messages import (
    Accepted,
    AdapterInfo,
    Cancel,
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
    preview_steps,
)
from krea2_srt.request import (
    MAX_TEXT_TOKENS,
    AdapterUse,
    RequestLimits,
    estimated_text_tokens,
)

MODULE = "krea2_srt.testing.fake_engine"
ADAPTERS = (
    AdapterInfo("acme/ink", digest="a" * 64, rank=16, bytes=2_000_000, where="host"),
    AdapterInfo("broken", error="adapter broken: there is no tensor in it"),
    AdapterInfo(
        "sepia", "Everything in sepia", ("sepia tones",), 0.8, "device", 500_000, "5" * 64, 8
    ),
)
"""For tests to put into `FakeEngine.adapters`."""

MODEL = ModelInfo(
    "krea/Krea-2-Turbo", True, 8, 0.0, RequestLimits(), "cpu", "float32", "none", adapters=True
)


@dataclass
class FakeEngine:
    """Answers on a port of its own, in a thread.

    Attributes:
        step_s: time of a step of one image.
        error: what every request ends in.
        refuse: what every request is refused with, before it is accepted.
        hold: while it is set, no request goes on.
        picture: the file of every image, in place of a generated one.
        requests: that have come.
        cancelled: ids that were cancelled while they were under way.
        on_preview: called with a request's id just before a preview of it is sent.
        port: to listen on; 0 is any free one.
        model: what it says that it serves.
        adapters: those that it serves, by name.
        names: what it was last told of them.
        load_error: why it loads none.
    """

    step_s: float = 0.0
    error: EngineError | None = None
    refuse: EngineError | None = None
    hold: threading.Event = field(default_factory=threading.Event)
    picture: bytes | None = None
    requests: list[GenerateRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    on_preview: Callable[[str], None] = lambda _: None
    port: int = 0
    model: ModelInfo = MODEL
    adapters: dict[str, AdapterInfo] = field(default_factory=dict)
    names: SetAdapterNames | None = None
    load_error: EngineError | None = None
    endpoint: str = ""

    def __enter__(self) -> "FakeEngine":
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, 0)
        try:
            self._socket.bind(f"tcp://127.0.0.1:{self.port or '*'}")
        except zmq.ZMQError:
            self._context.destroy(0)
            raise
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._stop = False
        self._running: dict[tuple[bytes, str], _Running] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._thread.join()
        self._context.term()  # waits until the port is free again

    def reset(self) -> None:
        """As at the start; what is under way goes on."""
        self.step_s, self.error, self.refuse, self.picture = 0.0, None, None, None
        self.requests.clear()
        self.cancelled.clear()
        self.hold.clear()
        self.adapters.clear()

    @property
    def waiting(self) -> int:
        """Requests under way."""
        return len(self._running)

    def _run(self) -> None:
        while not self._stop:
            if self._socket.poll(2 if self._running else 20):
                self._receive()
            for key in list(self._running):
                self._go_on(key)
        self._socket.close()

    def _receive(self) -> None:
        identity, _, payload = self._socket.recv_multipart()
        message = pickle.loads(payload)
        send = self._sender(identity)
        match message:
            case GenerateRequest():
                self.requests.append(message)
                if self.refuse is not None:
                    send(Generated(message.request_id, error=self.refuse))
                    return
                if (error := self._adapter_error(message)) is not None:
                    send(Generated(message.request_id, error=EngineError.of(error)))
                    return
                send(Accepted(message.request_id))
                self._running[identity, message.request_id] = _Running(message, send)
            case Cancel(request_id):
                if self._running.pop((identity, request_id), None) is not None:
                    self.cancelled.append(request_id)
            case ControlRequest(control_id, GetModel()):
                send(ControlReply(control_id, self.model))
            case ControlRequest(control_id, GetStatistics()):
                send(ControlReply(control_id, self._statistics()))
            case ControlRequest(control_id, GetAdapters()):
                infos = tuple(self.adapters[name] for name in sorted(self.adapters))
                send(ControlReply(control_id, infos))
            case ControlRequest(control_id, LoadAdapter()) if self.load_error is not None:
                send(ControlReply(control_id, error=self.load_error))
            case ControlRequest(control_id, LoadAdapter(name)):
                self.adapters[name] = AdapterInfo(name, where="host", digest="f" * 64, rank=8)
                send(ControlReply(control_id, self.adapters[name]))
            case ControlRequest(control_id, SetAdapterNames() as names):
                self.names = names
                send(ControlReply(control_id))
            case ControlRequest(control_id, UnloadAdapter(name)):
                gone = self.adapters.pop(name, None)
                unknown = EngineError.of(UnknownAdapterError(name)) if gone is None else None
                send(ControlReply(control_id, error=unknown))

    def _adapter_error(self, message: GenerateRequest) -> Krea2Error | None:
        for choice in sorted(message.adapters, key=lambda choice: choice.name):
            if choice.name not in self.adapters:
                return UnknownAdapterError(choice.name)
            if self.adapters[choice.name].error:
                return AdapterError(self.adapters[choice.name].error)
        return None

    def _adapters(self, message: GenerateRequest) -> tuple[AdapterUse, ...]:
        found = []
        for choice in sorted(message.adapters, key=lambda choice: choice.name):
            info = self.adapters[choice.name]
            scale = info.default_scale if choice.scale is None else choice.scale
            found.append(AdapterUse(choice.name, info.digest, scale))
        return tuple(found)

    def _statistics(self) -> dict[str, float]:
        number = len(self._running)
        waiting = sum(not running.step for running in self._running.values())
        counts = {"requests": number, "waiting": waiting, "running": number - waiting}
        return {**counts, "outstanding_s": 2.5 * number}

    def _sender(self, identity: bytes) -> Callable[[object], None]:
        def send(message: object) -> None:
            self._socket.send_multipart([identity, b"", pickle.dumps(message)])

        return send

    def _go_on(self, key: tuple[bytes, str]) -> None:
        running = self._running[key]
        if self.hold.is_set() or time.monotonic() < running.due:
            return
        message, image = running.message, running.message.image
        if self.error is not None:
            del self._running[key]
            running.send(Generated(message.request_id, error=self.error))
            return
        running.due = time.monotonic() + self.step_s
        running.step += 1
        if message.progress and running.step <= image.steps:
            self._tell_progress(running)
        if running.step >= image.steps or (not message.progress and not self.step_s):
            del self._running[key]
            running.send(self._generated(message))

    def _tell_progress(self, running: "_Running") -> None:
        message, image = running.message, running.message.image
        for index in range(image.num_images):
            update = ProgressUpdate(message.request_id, index, running.step, image.steps)
            running.send(update)
            if running.step in preview_steps(image.steps, message.previews):
                self.on_preview(message.request_id)
                running.send(replace(update, preview=_picture(64, 64, running.step)))

    def _generated(self, message: GenerateRequest) -> Generated:
        adapters = self._adapters(message)
        image = replace(message.image, adapters=frozenset(adapters))
        pictures = tuple(
            self.picture
            or encode_image(
                _picture(image.height, image.width, single.seed),
                message.output_format,
                message.quality,
                infotext(single, message.infotext_model),
            )
            for single in image.singles()
        )
        tokens = estimated_text_tokens(image.prompt)
        return Generated(
            message.request_id,
            pictures,
            text_tokens=tokens,
            image_tokens=image.image_tokens * image.num_images,
            prompt_cut=tokens == MAX_TEXT_TOKENS,
            stage_ms={"queue": 1.0, "encode": 2.0, "denoise": 30.0, "decode": 4.0},
            adapters=adapters,
        )


@dataclass
class _Running:
    message: GenerateRequest
    send: Callable[[object], None]
    step: int = 0
    due: float = 0.0


def _picture(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """A picture that tells its seed."""
    return np.full((height, width, 3), seed % 256, np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", allow_abbrev=False)
    parser.add_argument("--picture-bytes", type=int, required=True, help="of every file")
    args = parser.parse_args()
    with FakeEngine(picture=os.urandom(args.picture_bytes)) as engine:
        print(engine.endpoint, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
