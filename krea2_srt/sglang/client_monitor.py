"""Which of the channel's clients are still there."""

from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message


def events_in_order(context: zmq.Context) -> None:  # type: ignore[type-arg]
    """Have one I/O thread serve all sockets that are made from this context from now on.

    Of two threads one accepts and the other reads, and a message from a new connection can
    overtake the event of its beginning: then it looks as if it came from that descriptor's last
    owner, who has gone.
    """
    context.setsockopt(zmq.AFFINITY, 1)


class WatchedRouter:
    """A ROUTER socket that also knows when a client's connection has closed.

    ZeroMQ hides connections, but tells two things that together do: the file descriptor that a
    message came from, and, on a monitor socket, those that were accepted and closed. A client
    that hangs up, is killed or closes its socket is so noticed without a message.

    Everything that is not here is the wrapped socket's.

    Args:
        socket: bound; read by nobody else; of a context with `events_in_order`.
    """

    def __init__(self, socket: zmq.Socket) -> None:  # type: ignore[type-arg]
        assert socket.getsockopt(zmq.AFFINITY), "its context needs events_in_order"
        self._socket = socket
        self._monitor = socket.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._closed: set[int] = set()
        self._identities: dict[int, set[bytes]] = {}
        self._lost: set[bytes] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def recv_multipart(self, flags: int = 0) -> list[bytes]:
        """As the socket's own; notes where the message came from."""
        frames = self._socket.recv_multipart(flags, copy=False)
        identity = frames[0].bytes
        try:
            descriptor = frames[0].get(zmq.SRCFD)
        except zmq.ZMQError:
            # Not from ZeroMQ of this century, or no ZeroMQ at all: a port scanner, a browser.
            return [frame.bytes for frame in frames]
        # The events that made this descriptor the client's are older than its message: read
        # them first, or its predecessor's end would count as its own.
        self._read_events()
        if descriptor in self._closed:
            self._lost.add(identity)
        else:
            self._identities.setdefault(descriptor, set()).add(identity)
        return [frame.bytes for frame in frames]

    def pop_disconnected(self) -> set[bytes]:
        """Identities whose connections have closed since the last call."""
        self._read_events()
        lost, self._lost = self._lost, set()
        return lost

    def close(self, linger: int | None = None) -> None:
        """Close both sockets."""
        self._socket.disable_monitor()
        self._monitor.close(0)  # which that leaves open
        self._socket.close(linger)

    def _read_events(self) -> None:
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            descriptor = event["value"]
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._closed.discard(descriptor)
            else:
                self._closed.add(descriptor)
                self._lost |= self._identities.pop(descriptor, set())
