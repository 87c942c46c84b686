"""Hosts, as a `Host` header names them: text that may stand in a URL, or nothing."""

import ipaddress
import re
from dataclasses import dataclass

_HOST = re.compile(
    r"(?P<name>\[[0-9a-f:.]{2,45}\]|[a-z0-9_](?:[a-z0-9_.-]{0,251}[a-z0-9_.])?)"
    r"(?::(?P<port>[0-9]{1,5}))?"
)
_DEFAULT_PORTS = {"http": 80, "https": 443}

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Host:
    """A name or an address, and maybe a port.

    Attributes:
        name: in lower case; an IPv6 address has its brackets.
    """

    name: str
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Host | None":
        """None of what is no host: user names, spaces, paths, line ends and the like."""
        found = _HOST.fullmatch(text.lower())
        if found is None or ".." in found["name"]:
            return None
        name, port = found["name"], None if found["port"] is None else int(found["port"])
        if port is not None and not 1 <= port <= 65535:
            return None
        if name.startswith("["):
            try:
                name = f"[{ipaddress.IPv6Address(name[1:-1])}]"
            except ValueError:
                return None
        return cls(name, port)

    @classmethod
    def of_socket(cls, address: str, port: int) -> "Host | None":
        """The one of a socket's own address; None of what is no IP address."""
        # Without the interface of a link-local one, which is this machine's own name for it.
        found = ip_address(address.partition("%")[0])
        if found is None:
            return None
        return cls(f"[{found}]" if found.version == 6 else str(found), port)

    def origin(self, scheme: str) -> str:
        """What a URL begins with: ``https://host``, and the port unless it is the scheme's own."""
        port = "" if self.port in (None, _DEFAULT_PORTS.get(scheme)) else f":{self.port}"
        return f"{scheme}://{self.name}{port}"

    @property
    def is_loopback(self) -> bool:
        """Whether it is the machine itself of whoever opens it."""
        address = _address(self.name)
        return self.name == "localhost" or (address is not None and address.is_loopback)

    def matches(self, pattern: str) -> bool:
        """Whether it is a host of ``allowed_hosts``, on any port."""
        name, pattern = self.name.rstrip("."), pattern.lower()
        if pattern.startswith("*."):
            return name.endswith(pattern[1:])
        return name == pattern


def ip_address(text: str) -> IPAddress | None:
    """An IP address; of one of IPv4 in IPv6's clothes, the former. None of anything else."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _address(name: str) -> IPAddress | None:
    return ip_address(name.removeprefix("[").removesuffix("]"))


def checked_host(pattern: str) -> str:
    """An item of ``allowed_hosts``.

    Raises:
        ValueError: it is none.
    """
    host = Host.parse(pattern.removeprefix("*."))
    if host is None or host.port is not None:
        raise ValueError(
            "must be a host without scheme, port or path, images.example, or *.images.example for "
            f"all below it, got {pattern!r}"
        )
    return pattern


def checked_network(text: str) -> str:
    """An item of ``trusted_proxies``.

    Raises:
        ValueError: it is none.
    """
    try:
        ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(
            f"{error}; must be an address or a network, 10.0.0.7 or 10.0.0.0/8"
        ) from None
    return text
