"""Where clients reach this server: what the URLs of images begin with."""

import ipaddress
import logging
from dataclasses import replace
from urllib.parse import urlsplit

from starlette.types import Scope

from krea2_server.proxies.forwarded import Forwarded, read_forwarded
from krea2_server.proxies.hosts import Host, IPAddress, ip_address
from krea2_server.settings import NO_STORAGE, Settings

logger = logging.getLogger(__name__)


class PublicAddress:
    """The address that URLs begin with, for each request.

    It is ``public_url``; else what a trusted proxy says; else the host that the client has asked,
    if it is one of ``allowed_hosts`` or the local host, where nobody else can be; else the address
    that its connection has reached. So no client can have a URL signed that leads elsewhere.
    """

    def __init__(self, settings: Settings) -> None:
        self._public_url = settings.public_url.rstrip("/")
        self._networks = [ipaddress.ip_network(text) for text in settings.trusted_proxies]
        self._allowed_hosts = settings.allowed_hosts

    def base_url(self, scope: Scope) -> str:
        """Without a slash at its end; only a path where a connection has no address."""
        if self._public_url:
            return self._public_url
        forwarded = Forwarded()
        by_proxy = self._is_trusted(scope)
        if by_proxy:
            forwarded = read_forwarded(scope["headers"], self._trusts)
            for name in forwarded.malformed:
                logger.warning("a trusted proxy's %s header is malformed, and is ignored", name)
        mounted_at: str = scope.get("root_path", "").rstrip("/")
        return self._outside(scope, forwarded, by_proxy) + mounted_at

    def origins(self, scope: Scope) -> set[str]:
        """Where pages of our own come from: the host that the client has asked, and `base_url`'s.

        Nobody is sent there, so the `Host` header is enough: no page can choose what a browser
        writes into it.
        """
        public = urlsplit(self.base_url(scope))
        own = Host.parse(public.netloc)
        origins = set() if own is None else {own.origin(public.scheme)}
        if asked := _host_header(scope):
            # What ends TLS in front of us need not be trusted to say so.
            origins |= {asked.origin(scheme) for scheme in (scope["scheme"], "https")}
        return origins

    def _outside(self, scope: Scope, forwarded: Forwarded, by_proxy: bool) -> str:
        """Where this server's own paths begin, as the client sees it."""
        for host in (forwarded.host, _host_header(scope)):
            if host is not None and self._may_be(host, by_proxy):
                host = replace(host, port=host.port or forwarded.port)
                return host.origin(forwarded.proto or scope["scheme"]) + forwarded.prefix
        # What a proxy says of the way to itself says nothing of the way past it.
        address, port = scope.get("server") or ("", None)
        own = Host.of_socket(address, port) if port else None
        return own.origin(scope["scheme"]) if own else ""

    def _may_be(self, host: Host, by_proxy: bool) -> bool:
        if any(host.matches(pattern) for pattern in self._allowed_hosts):
            return True
        return host.is_loopback or (by_proxy and not self._allowed_hosts)

    def _is_trusted(self, scope: Scope) -> bool:
        if not self._networks:
            return False
        address, _ = scope.get("client") or ("", 0)
        found = ip_address(address.partition("%")[0])
        return found is not None and self._trusts(found)

    def _trusts(self, address: IPAddress) -> bool:
        return any(address in network for network in self._networks)


def _host_header(scope: Scope) -> Host | None:
    hosts = [value for name, value in scope["headers"] if name == b"host"]
    # Two are none: who knows which of them a proxy has looked at.
    return Host.parse(hosts[0].decode("latin-1")) if len(hosts) == 1 else None


def url_warning(settings: Settings) -> str:
    """What to say where URLs of images may lead nowhere; "" where they should be right."""
    serves_files = settings.storage != NO_STORAGE and "://" not in settings.storage
    told = settings.public_url or settings.trusted_proxies or settings.allowed_hosts
    if not serves_files or told or settings.host not in ("0.0.0.0", "::"):
        return ""
    return (
        "URLs of images begin with the address that a connection reaches on this machine, which "
        "behind a proxy or a mapped port is not the one that clients know: set public_url, "
        "trusted_proxies or allowed_hosts"
    )
