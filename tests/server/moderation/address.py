"""A server of ``/v1/moderations`` over real sockets, which answers as it is told."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = tuple[int, object]
"""Status and body: bytes, or what becomes JSON."""


def scored(**scores: float) -> Callable[[dict], Answer]:
    """Answers that give every input these scores; ``a__b`` is ``a/b``."""
    named = {name.replace("__", "/"): score for name, score in scores.items()}

    def respond(request: dict) -> Answer:
        return 200, {
            "id": "modr-1",
            "model": "m",
            "results": [result(named) for _ in inputs(request)],
        }

    return respond


def result(scores: dict[str, float]) -> dict:
    return {
        "flagged": any(score > 0.5 for score in scores.values()),
        "categories": {name: score > 0.5 for name, score in scores.items()},
        "category_scores": scores,
        "category_applied_input_types": {name: ["text", "image"] for name in scores},
    }


def inputs(request: dict) -> list:
    """What gets a result each: texts, or all parts of a multi-modal input together."""
    given = request["input"]
    if isinstance(given, str):
        return [given]
    return given if isinstance(given[0], str) else [given]


@dataclass
class Address:
    """A running one.

    Attributes:
        respond: what to answer.
        hold: while it is set, nothing is answered.
        hang_ups: how many requests to hang up on, instead of an answer.
        requests: the bodies of those that came.
        headers: of the last of them.
        connections: how many there were.
    """

    url: str = ""
    respond: Callable[[dict], Answer] = field(default_factory=scored)
    hold: threading.Event = field(default_factory=threading.Event)
    hang_ups: int = 0
    requests: list[dict] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    connections: int = 0


@contextlib.contextmanager
def moderations_address() -> Iterator[Address]:
    address = Address()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            address.connections += 1
            super().setup()

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            address.requests.append(body)
            address.headers = {name.lower(): value for name, value in self.headers.items()}
            if address.hang_ups:
                address.hang_ups -= 1
                self.close_connection = True
                return
            while address.hold.is_set():
                time.sleep(0.01)
            status, answer = (404, {}) if self.path != "/v1/moderations" else address.respond(body)
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            with contextlib.suppress(OSError):
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    address.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield address
    finally:
        address.hold.clear()
        server.shutdown()
        thread.join()
        server.server_close()
