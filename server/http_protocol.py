"""uvicorn's HTTP protocol, with the bounds that it lacks: on headers, and on clients' patience."""

import asyncio
import logging
from uuid import uuid4

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server.errors import ApiError

logger = logging.getLogger(__name__)


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
        _header_bytes = 0
        _pending_bytes = 0
        """Received since the parser last had something to say: what it keeps to itself."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._await_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            self._stop_send_timer()
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
            self._pending_bytes += len(data)
            super().data_received(data)
            # A header or trailer that has no end reaches no callback.
            if self._pending_bytes > max_header_bytes + len(data):
                self._refuse(431, too_large)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._header_bytes = self._pending_bytes = 0
            if self._header_timer is None:
                self._await_headers()  # the next request of a connection that was kept alive

        def on_url(self, url: bytes) -> None:
            super().on_url(url)
            self._count(len(url))

        def on_header(self, name: bytes, value: bytes) -> None:
            super().on_header(name, value)
            self._count(len(name) + len(value))

        def on_headers_complete(self) -> None:
            self._stop_timer()
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._pending_bytes = 0
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._pending_bytes = 0
            super().on_message_complete()

        def send_400_response(self, msg: str) -> None:
            # Called for what a callback raises too.
            if self._header_bytes > max_header_bytes:
                self._refuse(431, too_large)
            else:
                self._refuse(400, msg)

        @property
        def _answering(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

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
            if self._pending_bytes or self._header_bytes:
                self._refuse(408, f"no request arrived within {header_timeout_s:g} s")
            else:
                self.transport.close()

        def _watch_sending(self) -> None:
            left = self.transport.get_write_buffer_size()
            self._send_timer = self.loop.call_later(send_timeout_s, self._check_sending, left)

        def _check_sending(self, left: int) -> None:
            if self.transport.get_write_buffer_size() < left:
                self._watch_sending()
                return
            logger.info("a client does not take its answer; hanging up")
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
            if self._answering:
                # In the middle of an answer another would be taken for a part of it.
                self.transport.close()
                return
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
