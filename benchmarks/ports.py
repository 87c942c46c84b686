"""Free ports of this machine."""

import socket
from collections.abc import Iterable
from contextlib import ExitStack


def free_ports(names: Iterable[str]) -> dict[str, int]:
    """A port for each name. Somebody else may still take one before it is bound again."""
    with ExitStack() as stack:
        ports = {}
        for name in names:
            probe = stack.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            ports[name] = probe.getsockname()[1]
        return ports
