"""An OpenAI-style images endpoint, spoken to as any client would."""

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from urllib.parse import urljoin

import aiohttp
import numpy as np
import orjson
import pybase64

from krea2_bench.load.outcome import CANCELLED, DONE, FAILED, INTERRUPTED, REJECTED, Outcome
from krea2_bench.load.pictures import PictureError, decoded, load_decoders
from krea2_bench.load.plan import Planned
from krea2_bench.load.server_sent_events import event_data
from krea2_srt.errors import Krea2Error, first_line

_PATH = "/v1/images/generations"
_CONNECT_S = 30.0
# Below uvicorn's five seconds: a connection that the server closes just as a request goes out
# over it would be counted as its failure.
_KEEP_ALIVE_S = 3.0
_MAX_ERROR = 200

Pixels = tuple[np.ndarray, ...]
Keep = Callable[[int, Pixels], None]


class EndpointError(Krea2Error):
    """The server cannot be spoken to at all."""


class _Failure(Exception):
    """Why an answer is none."""


@dataclass(frozen=True)
class EndpointOptions:
    """How requests are sent.

    Attributes:
        url: of the server, without ``/v1``.
        model: sent with each request; "" asks the server, and sends none if it does not tell.
        api_key: sent as a bearer token, if there is one.
        stream: whether answers are streams of events.
        previews: pictures on the way of each image, of a stream.
        omit: fields that are not sent, for servers that do not know them.
        extra: fields that are sent with each request.
        timeout_s: after which a request has failed.
    """

    url: str = "http://127.0.0.1:30000"
    model: str = ""
    api_key: str = field(default="", repr=False)
    stream: bool = False
    previews: int = 0
    omit: frozenset[str] = frozenset()
    extra: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 600.0


class Endpoint:
    """An open client; a context.

    Args:
        options: how requests are sent.
        keep: given the pixels of each request's images by its index, from a thread; None keeps
            nothing.
    """

    def __init__(self, options: EndpointOptions, keep: Keep | None = None) -> None:
        self.options = options
        self.model = options.model
        self.keep = keep
        # Checking a picture takes longer than all else here, and lets the loop go on.
        self._checkers = ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2), "check")

    async def __aenter__(self) -> Self:
        # What the first picture would otherwise load while requests are timed.
        load_decoders()
        headers = {}
        if self.options.api_key:
            headers["authorization"] = f"Bearer {self.options.api_key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(self.options.timeout_s, sock_connect=_CONNECT_S),
            headers=headers,
            read_bufsize=2**20,
            trust_env=True,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._session.close()
        self._checkers.shutdown(cancel_futures=True)

    async def find_model(self) -> None:
        """See that the server is there, and ask for the model's name if it was not given.

        Raises:
            EndpointError: there is no server, or it refuses the key.
        """
        url = self.options.url
        try:
            async with self._session.get(f"{url}/v1/models") as response:
                if response.status in (401, 403):
                    raise EndpointError(f"url: {url} refuses the API key ({response.status})")
                body = await response.read()
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise EndpointError(f"url: no server answers at {url}: {first_line(error)}") from None
        if not self.model and response.status == 200:
            with suppress(ValueError, KeyError, IndexError, TypeError):
                self.model = str(orjson.loads(body)["data"][0]["id"])

    async def generate(self, planned: Planned, origin: float, due_s: float) -> Outcome:
        """Send a request and wait for its end.

        Args:
            planned: what to send.
            origin: `time.perf_counter` at the beginning that times count from.
            due_s: when it was to be sent.

        Returns:
            What became of it; `INTERRUPTED` if this is cancelled.
        """
        outcome = Outcome.begun(planned, due_s, time.perf_counter() - origin)
        answer = _Answer(origin)
        try:
            async with asyncio.timeout(planned.hang_up_s):
                await self._exchange(planned, outcome, answer)
            outcome.done_s = answer.at_s
            await self._check(planned, outcome, answer)
            outcome.outcome = DONE
            return outcome
        except TimeoutError:
            # Its own patience ran out, or that of the client for the server.
            waited_s = time.perf_counter() - origin - outcome.sent_s
            patience_s = planned.hang_up_s
            if patience_s is not None and waited_s >= patience_s:
                outcome.outcome = CANCELLED
            else:
                outcome.outcome = FAILED
                outcome.error = "timeout"
        except (_Failure, PictureError) as error:
            outcome.outcome = REJECTED if outcome.status == 429 else FAILED
            outcome.error = str(error)[:_MAX_ERROR]
        except asyncio.CancelledError:
            outcome.outcome = INTERRUPTED
        except aiohttp.ClientError as error:
            outcome.outcome = FAILED
            outcome.error = f"connection: {first_line(error)}"[:_MAX_ERROR]
        outcome.done_s = outcome.done_s or time.perf_counter() - origin
        return outcome

    async def _exchange(self, planned: Planned, outcome: Outcome, answer: "_Answer") -> None:
        body = orjson.dumps(self._fields(planned))
        headers = {"content-type": "application/json"}
        async with self._session.post(
            self.options.url + _PATH, data=body, headers=headers
        ) as response:
            outcome.status = response.status
            outcome.request_id = response.headers.get("x-request-id", "")
            if response.status != 200:
                text = await response.read()
                raise _Failure(f"{response.status} {_reason(text)}")
            if self.options.stream:
                await self._read_stream(response, outcome, answer)
            else:
                content = await response.read()
                answer.at_s = time.perf_counter() - answer.origin
                answer.add(_object(content))
        for url in answer.urls:
            # Some servers send paths only.
            async with self._session.get(urljoin(self.options.url, url)) as response:
                if response.status != 200:
                    raise _Failure(f"{response.status} for the image's URL")
                answer.pictures.append(await response.read())
            answer.at_s = time.perf_counter() - answer.origin
        outcome.stage_ms = answer.stage_ms
        outcome.request_id = outcome.request_id or answer.request_id

    async def _read_stream(
        self, response: aiohttp.ClientResponse, outcome: Outcome, answer: "_Answer"
    ) -> None:
        async for data in event_data(response.content.iter_any()):
            now_s = time.perf_counter() - answer.origin
            if data == b"[DONE]":
                break
            event = _object(data)
            kind = str(event.get("type", ""))
            if kind.endswith(".partial_image") and outcome.preview_s is None:
                outcome.preview_s = now_s
            elif kind.endswith(".completed"):
                answer.at_s = now_s
                answer.add({**event, "data": [event]})
            elif "error" in event:
                raise _Failure(f"stream: {_reason(data)}")

    async def _check(self, planned: Planned, outcome: Outcome, answer: "_Answer") -> None:
        kind = planned.kind
        if len(answer.pictures) != kind.n:
            raise _Failure(f"{len(answer.pictures)} images in place of {kind.n}")

        def check() -> tuple[Pixels, int]:
            files = [
                p if isinstance(p, bytes) else pybase64.b64decode(p, validate=True)
                for p in answer.pictures
            ]
            pixels = tuple(decoded(file, kind.width, kind.height) for file in files)
            if self.keep is not None:
                self.keep(planned.index, pixels)
            return pixels, sum(map(len, files))

        loop = asyncio.get_running_loop()
        try:
            _, outcome.num_bytes = await loop.run_in_executor(self._checkers, check)
        except ValueError as error:
            raise PictureError(f"broken image: {error}") from None

    def _fields(self, planned: Planned) -> dict[str, Any]:
        kind = planned.kind
        fields: dict[str, Any] = {
            "prompt": planned.prompt.text,
            "size": kind.size,
            "n": kind.n,
            "response_format": "b64_json",
            "output_format": "png",
            "seed": planned.seed,
        }
        if self.model:
            fields["model"] = self.model
        if kind.steps is not None:
            fields["num_inference_steps"] = kind.steps
        if kind.priority:
            fields["priority"] = kind.priority
        if self.options.stream:
            fields["stream"] = True
            fields["partial_images"] = self.options.previews
        fields |= self.options.extra
        return {name: value for name, value in fields.items() if name not in self.options.omit}


@dataclass
class _Answer:
    """What has come of an answer: pictures as text in base64, or as bytes from their URLs."""

    origin: float
    at_s: float = 0.0
    pictures: list[str | bytes] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    stage_ms: dict[str, float] = field(default_factory=dict)
    request_id: str = ""

    def add(self, body: dict[str, Any]) -> None:
        data = body.get("data")
        if not isinstance(data, list):
            raise _Failure("an answer without data")
        for image in data:
            picture = image.get("b64_json") if isinstance(image, dict) else None
            url = image.get("url") if isinstance(image, dict) else None
            if isinstance(picture, str):
                self.pictures.append(picture)
            elif isinstance(url, str):
                self.urls.append(url)
            else:
                raise _Failure("an image without b64_json or url")
        timings = body.get("timings")
        if isinstance(timings, dict):
            self.stage_ms = {
                name.removesuffix("_ms"): float(ms)
                for name, ms in timings.items()
                if isinstance(ms, int | float)
            }
        self.request_id = str(body.get("id", ""))


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise _Failure("an answer that is no JSON object")
    return found


def _reason(body: bytes) -> str:
    """The message of an error's body, or its beginning."""
    with suppress(ValueError, AttributeError):
        found = orjson.loads(body)
        error = found.get("error", found)
        message = error.get("code") or error.get("message") or error.get("detail")
        if message:
            return str(message)
    return body[:_MAX_ERROR].decode(errors="replace")
