"""uvicorn's HTTP protocol, with the bounds that it lacks: on headers, and on clients' patience."""

import asyncio
import logging
from typing import Any
from uuid import uuid4

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from krea2_server.errors import ApiError

logger = logging.getLogger(__name__)

Headers = list[tuple[bytes, bytes]]

_MAX_PIPELINED = 8
"""Requests of a connection that are read while the first of them has no answer yet."""


def _without_upgrade(headers: Headers) -> Headers:
    """Without what offers another protocol."""
    offers = {b"upgrade", b"http2-settings"}
    left = []
    for name, value in headers:
        if name == b"connection":
            tokens = [token.strip() for token in value.split(b",")]
            value = b", ".join(token for token in tokens if token.lower() not in offers)
        if value and name not in offers:
            left.append((name, value))
    return left


def _done(cycle: RequestResponseCycle) -> bool:
    return cycle.response_complete or cycle.disconnected


def bounded_protocol(
    max_header_bytes: int, header_timeout_s: float, send_timeout_s: float
) -> type[asyncio.Protocol]:
    """A protocol class for uvicorn.

    Args:
        max_header_bytes: of a request's line and headers, and of a chunked body's trailers.
        header_timeout_s: for them to arrive, from the connection or the request's first byte on.
        send_timeout_s: without a byte taken, after which a client that is sent something is gone.
    """

    too_large = f"the headers are larger than {max_header_bytes} bytes"

    class BoundedHttpProtocol(HttpToolsProtocol):
        _header_timer: asyncio.TimerHandle | None = None
        _send_timer: asyncio.TimerHandle | None = None
        _in_headers = False
        _discard_input = False
        _header_bytes = 0
        _pending_bytes = 0
        """Received since the parser last had something to say: what it keeps to itself."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._unanswered: list[RequestResponseCycle] = []

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._await_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            self._stop_send_timer()
            # uvicorn tells only the request that came last.
            for cycle in self._unanswered:
                cycle.disconnected = not cycle.response_complete
                cycle.message_event.set()
            super().connection_lost(exc)

        # uvicorn hands a whole answer to the transport, which would keep it for ever.

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch_sending()

        def resume_writing(self) -> None:
            self._stop_send_timer()
            super().resume_writing()

        def timeout_keep_alive_handler(self) -> None:
            if self.transport.get_write_buffer_size():
                self.transport.abort()
            else:
                super().timeout_keep_alive_handler()

        def data_received(self, data: bytes) -> None:
            if self._discard_input:
                return
            self._unset_keepalive_if_required()
            self._pending_bytes += len(data)
            self._feed(data)
            # A header or trailer that has no end reaches no callback.
            if self._pending_bytes > max_header_bytes + len(data):
                self._refuse(431, too_large)
            elif self._header_timer is None and not self._answering:
                # The next request of a connection that was kept alive, or empty lines before it.
                self._await_headers()

        def _feed(self, data: bytes) -> None:
            while True:
                try:
                    self.parser.feed_data(data)
                    return
                except httptools.HttpParserUpgrade as upgrade:
                    if self.parser.get_method() == b"CONNECT":
                        self.send_400_response("CONNECT is not supported")
                        return
                    # The parser has stopped after the headers, for the other protocol to take
                    # over. A server may pass over such an offer.
                    rest = data[upgrade.args[0] :]
                    data = self._head_without_upgrade() + rest
                    self.parser = httptools.HttpRequestParser(self)
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                except httptools.HttpParserError:
                    self.send_400_response("malformed HTTP request")
                    return

        def _head_without_upgrade(self) -> bytes:
            """Head of the request that was just read, as if it had offered no upgrade."""
            lines = [name + b": " + value for name, value in _without_upgrade(self.headers)]
            version = self.parser.get_http_version().encode()
            first = self.parser.get_method() + b" " + self.url + b" HTTP/" + version
            return b"\r\n".join([first, *lines, b"\r\n"])

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._in_headers = True
            self._header_bytes = self._pending_bytes = 0
            if self._header_timer is None:
                self._await_headers()

        def on_url(self, url: bytes) -> None:
            super().on_url(url)
            self._count(len(url))

        def on_header(self, name: bytes, value: bytes) -> None:
            if self._in_headers:  # else a trailer, which may say nothing of its request
                super().on_header(name, value)
            self._count(len(name) + len(value))

        def on_headers_complete(self) -> None:
            self._stop_timer()
            self._in_headers = False
            if self.parser.should_upgrade():
                return
            super().on_headers_complete()
            self._unanswered = [each for each in self._unanswered if not _done(each)]
            self._unanswered.append(self.cycle)
            if len(self._unanswered) <= _MAX_PIPELINED:
                # Else a client that hangs up would not be noticed before its first answer.
                self.flow.resume_reading()

        def on_body(self, body: bytes) -> None:
            self._pending_bytes = 0
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._pending_bytes = 0
            if not self.parser.should_upgrade():
                super().on_message_complete()

        def on_response_complete(self) -> None:
            if self._send_timer is None and self.transport.get_write_buffer_size():
                # Too little for the transport to say so, but it may still lie there for ever.
                self._watch_sending()
            super().on_response_complete()

        def send_400_response(self, msg: str) -> None:
            # Called for what a callback raises too.
            if self._header_bytes > max_header_bytes:
                self._refuse(431, too_large)
            else:
                self._refuse(400, msg)

        @property
        def _answering(self) -> bool:
            return not all(map(_done, self._unanswered))

        def _count(self, size: int) -> None:
            self._pending_bytes = 0
            self._header_bytes += size
            if self._header_bytes > max_header_bytes:
                raise ValueError(too_large)

        def _await_headers(self) -> None:
            self._header_timer = self.loop.call_later(header_timeout_s, self._headers_late)

        def _headers_late(self) -> None:
            if self._answering:
                self._await_headers()  # the one before this is not to be spoiled
                return
            self._header_timer = None
            if self._in_headers:
                self._refuse(408, f"no request arrived within {header_timeout_s:g} s")
            else:
                self.transport.close()

        def _watch_sending(self) -> None:
            self._stop_send_timer()
            left = self.transport.get_write_buffer_size()
            self._send_timer = self.loop.call_later(send_timeout_s, self._check_sending, left)

        def _check_sending(self, left: int) -> None:
            self._send_timer = None
            size = self.transport.get_write_buffer_size()
            if size == 0:
                return
            if size < left:
                self._watch_sending()
                return
            logger.info("send timeout: a client does not read its response; closing the connection")
            self.transport.abort()

        def _stop_send_timer(self) -> None:
            if self._send_timer is not None:
                self._send_timer.cancel()
                self._send_timer = None

        def _stop_timer(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

        def _refuse(self, status: int, message: str) -> None:
            """Answer what never became a request, and hang up."""
            if self.transport is None or self.transport.is_closing():
                return
            whole = [each for each in self._unanswered if not (each.more_body or _done(each))]
            if whole:
                # They are answered, and what came behind them is not.
                whole[-1].keep_alive = False
                self._discard_input = True
                return
            for broken in self._unanswered:
                if broken.response_started:
                    # In the middle of an answer another would be taken for a part of it.
                    self.transport.close()
                    return
                broken.disconnected = True
                broken.message_event.set()
            codes = {400: "bad_request", 408: "request_timeout", 431: "headers_too_large"}
            body = orjson.dumps(ApiError(status, message, codes[status]).body())
            headers = (
                "content-type: application/json\r\n"
                f"content-length: {len(body)}\r\n"
                f"x-request-id: req_{uuid4().hex}\r\n"
                "connection: close\r\n\r\n"
            )
            self.transport.write(STATUS_LINE[status] + headers.encode() + body)
            self.transport.close()

    return BoundedHttpProtocol
