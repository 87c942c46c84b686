"""A server that speaks the images API as a test has scripted it, and generates scenery."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from krea2_server.playground import playground_files
from tests.server.playground.scenery import add_noise, draw_scene, to_base64

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
TOTAL_STEPS = 8
PREVIEW_STEPS = (2, 4, 6)
RANDOM_SEED = 4_000_000_000
MAX_ADAPTERS = 4
MAX_SCALE = 10
PAUSE_S = 0.02


@dataclass
class Script:
    """What the stand-in does, and what it saw. A test changes it while the server runs.

    Attributes:
        ready: whether the model is loaded.
        key: the API key that is asked for.
        limits: of the model, in place of the usual.
        adapters: that are listed, as `adapter` makes them; None is a server that knows of none.
        refusal: status, message and headers of the next answer.
        ahead: requests that the stream says are before it; None is no word about it.
        hold_at: steps after which streams stand still; 0 is before the first, in the queue.
        end: how streams end after their last step.
        truncated: whether the prompt was longer than the model reads.
        bodies: of all requests for images.
        left: streams whose client went away.
    """

    ready: bool = True
    key: str | None = None
    limits: dict[str, Any] = field(default_factory=dict)
    adapters: list[dict[str, Any]] | None = field(default_factory=list)
    refusal: tuple[int, str, dict[str, str]] | None = None
    ahead: int | None = None
    hold_at: set[int] = field(default_factory=set)
    end: Literal["completed", "error", "lost", "broken"] = "completed"
    truncated: bool = False
    bodies: list[dict[str, Any]] = field(default_factory=list)
    left: int = 0


def adapter(name: str, **fields: Any) -> dict[str, Any]:
    """An entry of /v1/loras."""
    usual = {
        "title": None,
        "trigger_words": [],
        "default_scale": 1.0,
        "where": "disk",
        "bytes": 500_000,
        "sha256": None,
        "rank": None,
        "error": None,
    }
    assert fields.keys() <= usual.keys()
    return {"name": name, **usual, **fields}


class StandIn:
    """The server and the script of the running test."""

    def __init__(self) -> None:
        self.script = Script()
        self.app = FastAPI()
        self.app.middleware("http")(self._add_policy)
        self.app.get("/ready")(self._ready)
        self.app.get("/v1/models")(self._models)
        self.app.get("/v1/loras")(self._loras)
        self.app.post("/v1/images/generations")(self._generate)
        for path, (content, media_type) in playground_files().items():
            self.app.get(path)(_serving(content, media_type))

    async def _add_policy(self, request: Request, call_next: Any) -> Response:
        response = await call_next(request)
        response.headers["content-security-policy"] = CONTENT_SECURITY_POLICY
        return response

    async def _ready(self) -> Response:
        if self.script.ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse(_error("the model is being loaded", "engine_unavailable"), 503)

    async def _models(self, request: Request) -> Response:
        if refusal := self._refuse_key(request):
            return refusal
        limits = {
            "default_steps": TOTAL_STEPS,
            "default_guidance": 0.0,
            "trained_side": 2048,
            "max_n": 10,
            "max_side": 4096,
            "max_pixels": 4194304,
            "max_steps": 200,
            "max_guidance": 100.0,
            "size_multiple": 16,
            "max_aspect": 3,
            "max_prompt": 32_000,
            "output_formats": ["png", "jpeg", "webp"],
        }
        model = {"id": "krea-2-turbo", "object": "model", "created": 1, "owned_by": "krea"}
        model["krea2"] = limits | self.script.limits
        return JSONResponse({"object": "list", "data": [model]})

    async def _loras(self, request: Request) -> Response:
        if refusal := self._refuse_key(request):
            return refusal
        if self.script.adapters is None:
            return JSONResponse(_error("there is nothing here", "not_found"), 404)
        return JSONResponse({"object": "list", "data": self.script.adapters})

    async def _generate(self, request: Request) -> Response:
        script = self.script
        if refusal := self._refuse_key(request):
            return refusal
        body = await request.json()
        script.bodies.append(body)
        if script.refusal:
            status, message, headers = script.refusal
            return JSONResponse(_error(message, "refused"), status, headers)
        if problem := _adapters_problem(body, script):
            return JSONResponse(_error(problem, "unknown_adapter"), 400)
        if not body.get("stream"):
            pictures = [(await _completed(body, index, script)) for index in range(body["n"])]
            return JSONResponse({"created": 1, "data": pictures})
        return StreamingResponse(_stream(script, body), media_type="text/event-stream")

    def _refuse_key(self, request: Request) -> Response | None:
        if self.script.key and request.headers.get("authorization") != f"Bearer {self.script.key}":
            return JSONResponse(_error("The API key is missing or wrong.", "invalid_api_key"), 401)
        return None


def _adapters_problem(body: dict[str, Any], script: Script) -> str | None:
    """What the server would have against the adapters of a request."""
    asked = body.get("lora", [])
    names = [one["name"] for one in asked]
    if len(asked) > MAX_ADAPTERS:
        return f"lora: at most {MAX_ADAPTERS} adapters at a time"
    if len({*names}) < len(names):
        return "lora: one is asked for twice; give one scale"
    usable = {one["name"] for one in script.adapters or () if not one["error"]}
    for one in asked:
        if not one.keys() <= {"name", "scale"}:
            return "lora: has a field that is unknown"
        scale = one.get("scale", 0)
        if not isinstance(scale, int | float) or abs(scale) > MAX_SCALE:
            return f"lora: the scale of {one['name']} must be a number from -10 to 10"
        if one["name"] not in usable:
            return f"lora: adapter {one['name']!r} is not served here, nor is any other"
    return None


def _adapters_used(body: dict[str, Any], script: Script) -> list[dict[str, Any]]:
    defaults = {one["name"]: one["default_scale"] for one in script.adapters or ()}
    return [
        {"name": name, "scale": scale, "sha256": "5" * 64}
        for name, scale in sorted(
            (one["name"], one.get("scale", defaults[one["name"]])) for one in body["lora"]
        )
    ]


async def _stream(script: Script, body: dict[str, Any]) -> AsyncIterator[str]:
    ended = False
    try:
        if script.ahead is not None:
            yield f": queued ahead={script.ahead}\n\n"
        await _hold(script, 0)
        width, height = map(int, body["size"].split("x"))
        for step in range(1, TOTAL_STEPS + 1):
            for index in range(body["n"]):
                yield f": step image={index} step={step} total={TOTAL_STEPS}\n\n"
                if step in PREVIEW_STEPS:
                    yield await _preview(body, width, height, index, step)
            await _hold(script, step)
        if script.end == "broken":
            raise ConnectionResetError("as scripted")
        if script.end == "error":
            yield _event("error", _error("the generation failed", "generation_failed"))
        for index in range(body["n"]) if script.end == "completed" else ():
            completed = await _completed(body, index, script)
            yield _event("image_generation.completed", completed)
        ended = True
    except ConnectionResetError:
        # The server's way to end a response in the middle, without a word.
        ended = True
        raise
    finally:
        script.left += not ended


async def _hold(script: Script, step: int) -> None:
    await asyncio.sleep(PAUSE_S)
    while step in script.hold_at:
        await asyncio.sleep(PAUSE_S)


def _seed(body: dict[str, Any], index: int) -> int:
    return body.get("seed", RANDOM_SEED) + index


async def _preview(body: dict[str, Any], width: int, height: int, index: int, step: int) -> str:
    def generate() -> str:
        scene = draw_scene(width, height, _seed(body, index))
        noisy = add_noise(scene, 1 - step / TOTAL_STEPS, step)
        return to_base64(noisy, "png")

    previews = PREVIEW_STEPS.index(step)
    return _event(
        "image_generation.partial_image",
        {
            "type": "image_generation.partial_image",
            "b64_json": await asyncio.to_thread(generate),
            "partial_image_index": previews,
            "image_index": index,
            "step": step,
            "total_steps": TOTAL_STEPS,
            "output_format": "png",
            "size": body["size"],
        },
    )


async def _completed(body: dict[str, Any], index: int, script: Script) -> dict[str, Any]:
    seed, image_format = _seed(body, index), body["output_format"]
    width, height = map(int, body["size"].split("x"))

    def generate() -> str:
        return to_base64(draw_scene(width, height, seed), image_format)

    return {
        "type": "image_generation.completed",
        "b64_json": await asyncio.to_thread(generate),
        "image_index": index,
        "seed": seed,
        "size": body["size"],
        "output_format": image_format,
        "timings": {"queue_ms": 3.4, "encode_ms": 12.0, "denoise_ms": 1144.0, "decode_ms": 61.0},
        "usage": {"input_tokens": 12, "output_tokens": 1024, "total_tokens": 1036},
        "prompt_truncated": script.truncated,
        **({"lora": _adapters_used(body, script)} if body.get("lora") else {}),
    }


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def _error(message: str, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "server_error", "param": None, "code": code}}


def _serving(content: bytes, media_type: str) -> Any:
    async def serve() -> Response:
        return Response(content, media_type=media_type)

    return serve


@contextmanager
def running(stand_in: StandIn) -> Iterator[str]:
    """Serve it on a free port of this machine; gives its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    # log_config: uvicorn's levels would be those of all tests.
    config = uvicorn.Config(stand_in.app, log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(5)
