"""What proxies say of a request: `X-Forwarded-Host` and its like, or RFC 7239's `Forwarded`.

Whom to believe is decided elsewhere. Of a list of `X-Forwarded-*` the end counts, which the nearest
proxy has written or passed on: nothing tells how much of what stands before it a client has
invented. `Forwarded` names each hop, so there the hops of trusted proxies can be followed.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from krea2_server.proxies.hosts import Host, IPAddress, ip_address

T = TypeVar("T")

Trusts = Callable[[IPAddress], bool]

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
# Hosts and addresses with colons are quoted by the standard, and not by everybody.
_PAIR = re.compile(rf'[ \t]*({_TOKEN})=("(?:[^"\\]|\\.)*"|[^\s",;]*)[ \t]*')
_NODE = re.compile(r"(?:\[(?P<v6>[^\]]*)\]|(?P<v4>[^:\[\]]*))(?::[\w.-]+)?")
_PREFIX = re.compile(r"(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._~-]+){0,20}/?")
_MAX_PREFIX = 200
_MAX_HOPS = 50


@dataclass(frozen=True)
class Forwarded:
    """Parts of the URL that the client has asked for; None is what nobody has said.

    Attributes:
        proto: ``http`` or ``https``.
        port: of a host that has none.
        prefix: of the path, which a proxy has taken off it; "" is none.
        malformed: names of headers that were not understood, and so say nothing.
    """

    proto: str | None = None
    host: Host | None = None
    port: int | None = None
    prefix: str = ""
    malformed: tuple[str, ...] = ()


def read_forwarded(headers: Iterable[tuple[bytes, bytes]], trusts: Trusts) -> Forwarded:
    """What a trusted proxy says.

    `Forwarded` counts only beside neither `X-Forwarded-Host` nor `-Proto`: a proxy that writes
    these, as most do, may pass on a client's `Forwarded` as it is.

    Args:
        headers: of the request, with names in lower case.
        trusts: whether an address is a trusted proxy's.
    """
    reader = _Reader(headers)
    if reader.has("forwarded") and not reader.has("x-forwarded-host", "x-forwarded-proto"):
        hop = reader.hop(trusts)
        proto = reader.parsed("forwarded", hop.get("proto"), _proto)
        host = reader.parsed("forwarded", hop.get("host"), Host.parse)
    else:
        proto = reader.last("x-forwarded-proto", _proto)
        host = reader.last("x-forwarded-host", Host.parse)
    port = reader.last("x-forwarded-port", _port)
    prefix = reader.last("x-forwarded-prefix", _prefix)
    return Forwarded(proto, host, port, prefix or "", tuple(dict.fromkeys(reader.malformed)))


class _Reader:
    """Reads headers, and remembers those that are malformed."""

    def __init__(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self.malformed: list[str] = []
        self._texts: dict[str, str] = {}
        for name, value in headers:
            if name != b"forwarded" and not name.startswith(b"x-forwarded-"):
                continue
            if text := value.decode("latin-1").strip():
                key = name.decode("latin-1")
                # A header that comes twice is one list.
                self._texts[key] = f"{self._texts[key]},{text}" if key in self._texts else text

    def has(self, *names: str) -> bool:
        return any(name in self._texts for name in names)

    def last(self, name: str, parse: Callable[[str], T | None]) -> T | None:
        """The last item of a list."""
        text = self._texts.get(name)
        return self.parsed(name, text and text.rpartition(",")[2].strip(), parse)

    def parsed(self, name: str, text: str | None, parse: Callable[[str], T | None]) -> T | None:
        if text is None:
            return None
        found = parse(text)
        if found is None:
            self.malformed.append(name)
        return found

    def hop(self, trusts: Trusts) -> Mapping[str, str]:
        """What `Forwarded` says of the first hop that came from no trusted proxy."""
        hops = _hops(self._texts["forwarded"])
        if not hops:
            self.malformed.append("forwarded")
            return {}
        while len(hops) > 1 and _is_trusted(hops[-1].get("for", ""), trusts):
            hops.pop()
        return hops[-1]


def _hops(text: str) -> list[dict[str, str]]:
    """The hops of a `Forwarded`, with names in lower case; none of what is malformed."""
    hops: list[dict[str, str]] = [{}]
    at = 0
    while True:
        pair = _PAIR.match(text, at)
        if pair is None or len(hops) > _MAX_HOPS:
            return []
        name, value = pair[1].lower(), pair[2]
        if name in hops[-1]:
            return []
        if value.startswith('"'):
            value = re.sub(r"\\(.)", r"\1", value[1:-1])
        hops[-1][name] = value
        at = pair.end()
        if at == len(text):
            return hops
        if text[at] == ",":
            hops.append({})
        elif text[at] != ";":
            return []
        at += 1


def _is_trusted(node: str, trusts: Trusts) -> bool:
    found = _NODE.fullmatch(node)
    address = ip_address(found["v6"] or found["v4"] or "") if found else None
    return address is not None and trusts(address)


def _proto(text: str) -> str | None:
    return text.lower() if text.lower() in ("http", "https") else None


def _port(text: str) -> int | None:
    found = re.fullmatch("[0-9]{1,5}", text)
    return int(text) if found and 1 <= int(text) <= 65535 else None


def _prefix(text: str) -> str | None:
    """Without a slash at its end."""
    return text.rstrip("/") if len(text) <= _MAX_PREFIX and _PREFIX.fullmatch(text) else None
