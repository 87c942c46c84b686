"""A relay that keeps what clients send on the way to a server."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx


@dataclass
class Relay:
    """A server's address for clients whose requests are to be seen.

    Attributes:
        url: without a path.
        bodies: of the requests that came, as JSON.
    """

    url: str
    bodies: list[dict] = field(default_factory=list)


@contextmanager
def relay(target: str) -> Iterator[Relay]:
    """Pass POSTs on, each answer in one piece.

    Args:
        target: the server's URL, without a path.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            found.bodies.append(json.loads(body))
            headers = {"content-type": self.headers["content-type"]}
            answer = httpx.post(target + self.path, content=body, headers=headers, timeout=300)
            self.send_response(answer.status_code)
            self.send_header("content-type", answer.headers["content-type"])
            self.send_header("content-length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        def log_message(self, *_: object) -> None:
            """Nothing: tests read the bodies."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found = Relay(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield found
        finally:
            server.shutdown()
            thread.join()
