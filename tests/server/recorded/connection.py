"""A client of HTTP that keeps every byte: a header's place, a chunk's end."""

import socket
from dataclasses import dataclass

from tests.channel import PATIENCE_S


@dataclass(frozen=True)
class Answer:
    """What has come.

    Attributes:
        head: the lines of the status and the headers; none if the client has hung up before that.
        body: whole, or of a stream the chunks.
        closed: whether the server has closed the connection after it.
    """

    head: tuple[str, ...]
    body: tuple[bytes, ...]
    closed: bool

    @property
    def whole(self) -> bytes:
        return b"".join(self.body)

    def header(self, name: str) -> str:
        """A header's value; empty if it is not there."""
        for line in self.head[1:]:
            key, _, value = line.partition(": ")
            if key == name:
                return value
        return ""


class Connection:
    """One request's.

    Args:
        port: of loopback.
        data: what is sent.
    """

    def __init__(self, port: int, data: bytes) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        self._received = b""
        self._socket.sendall(data)

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def close(self) -> None:
        self._socket.close()

    def wait_for_continue(self) -> None:
        """Wait until the server asks for the body."""
        head = self._head()
        assert head == ("HTTP/1.1 100 Continue",), head

    def read_until(self, text: str, times: int = 1) -> None:
        """Read until a text has come so often."""
        while self._received.count(text.encode()) < times:
            self._more()

    def so_far(self, text: str, times: int) -> Answer:
        """What has come, up to a text's end; nothing if it is empty."""
        if not text:
            return Answer((), (), False)
        end = -1
        for _ in range(times):
            end = self._received.index(text.encode(), end + 1)
        self._received = self._received[: end + len(text.encode())]
        head = self._head()
        return Answer(head, tuple(self._chunks(partial=True)), False)

    def answer(self, to_head: bool = False) -> Answer:
        """Read an answer to its end.

        Args:
            to_head: whether it is one to HEAD, which has no body.
        """
        head = self._head()
        values = dict(line.lower().split(": ", 1) for line in head[1:])
        if to_head:
            body: tuple[bytes, ...] = ()
        elif values.get("transfer-encoding") == "chunked":
            body = tuple(self._chunks())
        else:
            body = (self._take(int(values.get("content-length", "0"))),)
        assert not self._received, "more came than the answer"
        closed = values.get("connection") == "close"
        if closed:
            rest = self._socket.recv(1)
            assert not rest, "more came than the answer"
        self.close()
        return Answer(head, body, closed)

    def _head(self) -> tuple[str, ...]:
        self.read_until("\r\n\r\n")
        head, _, self._received = self._received.partition(b"\r\n\r\n")
        return tuple(head.decode("latin-1").split("\r\n"))

    def _chunks(self, partial: bool = False) -> list[bytes]:
        chunks: list[bytes] = []
        while not (partial and b"\r\n" not in self._received):
            self.read_until("\r\n")
            size, _, self._received = self._received.partition(b"\r\n")
            if partial and len(self._received) < int(size, 16) + 2:
                return [*chunks, self._received]
            chunk = self._take(int(size, 16) + 2)
            assert chunk.endswith(b"\r\n")
            if size == b"0":
                return chunks
            chunks.append(chunk[:-2])
        return chunks

    def _take(self, size: int) -> bytes:
        while len(self._received) < size:
            self._more()
        taken, self._received = self._received[:size], self._received[size:]
        return taken

    def _more(self) -> None:
        data = self._socket.recv(2**16)
        assert data, f"the connection has ended after {self._received!r}"
        self._received += data
