"""The real nginx, with the block of docs/operations.md."""

import contextlib
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from krea2_srt.testing.processes import ChildProcess, free_ports
from tests.programs import required
from tests.server.serving import Api

ROOT = Path(__file__).parents[2]
_TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


@dataclass(frozen=True)
class Behind:
    """A server that is reached by way of nginx.

    Attributes:
        url: of the server itself.
        read_timeout: of nginx's, in its words; "" is the page's.
    """

    url: str
    read_timeout: str = ""


def documented_block() -> str:
    """The one in the page."""
    page = (ROOT / "docs/operations.md").read_text()
    (block,) = re.findall(r"```nginx\n(.*?)```", page, re.DOTALL)
    return block


def _block(behind: Behind, port: int) -> str:
    changes = {
        "listen 443 ssl;": f"listen 127.0.0.1:{port};",
        "http://127.0.0.1:30000": behind.url,
    }
    if behind.read_timeout:
        changes["proxy_read_timeout 600s;"] = f"proxy_read_timeout {behind.read_timeout};"
    text = documented_block()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text


class _Nginx(ChildProcess):
    def __init__(self, folder: Path, ports: list[int], blocks: list[str]) -> None:
        self._ports = ports
        conf = folder / "nginx.conf"
        temporary = "\n".join(f"{name}_temp_path {folder}/{name};" for name in _TEMPORARY)
        conf.write_text(
            f"daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr;\n"
            f"events {{}}\nhttp {{ access_log off;\n{temporary}\n{chr(10).join(blocks)}}}\n"
        )
        command = [required("nginx"), "-e", "stderr", "-p", folder, "-c", conf]
        super().__init__(command, folder / "nginx.log")

    def wait_until_up(self) -> None:
        for port in self._ports:
            self.wait_until(partial(_is_open, port), f"port {port} is open")


def _is_open(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@contextlib.contextmanager
def nginx(folder: Path, *behind: Behind) -> Iterator[list[Api]]:
    """One process, with a port for each server; it is skipped where there is no nginx."""
    ports = list(free_ports(map(str, range(len(behind)))).values())
    blocks = [_block(each, port) for each, port in zip(behind, ports, strict=True)]
    with _Nginx(folder, ports, blocks):
        yield [Api(f"http://127.0.0.1:{port}") for port in ports]
