"""Whether the server in this container is alive: ``python -m krea2_server.health``.

The image's health check. It asks where the server says that it listens, whichever way it was told
to; a proxy that the environment names is not for loopback. Exit code 1, with a line, is no.
"""

import http.client
import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

VARIABLE = "KREA2_SERVE_ADDRESS_FILE"
"""Where the server's setting `address_file` is, which the image sets."""

_TIMEOUT_S = 4
"""Less than the image waits for us."""


def problem() -> str:
    """What is wrong with the server; "" if nothing is."""
    if not (file := os.environ.get(VARIABLE)):
        return f"{VARIABLE} is not set"
    try:
        address = urlsplit(Path(file).read_text().strip())
        connection = http.client.HTTPConnection(
            address.hostname or "", address.port, timeout=_TIMEOUT_S
        )
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"{file}: {error or type(error).__name__}"
    return "" if status == http.client.OK else f"/health answers {status}"


if __name__ == "__main__":
    sys.exit(problem() or None)
