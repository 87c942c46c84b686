"""What URLs begin with, by who says what."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krea2_server.proxies.public_address import PublicAddress, url_warning
from krea2_server.settings import load_settings

PROXY, CLIENT, EDGE = "10.0.0.7", "203.0.113.9", "10.0.0.8"
OWN = "http://192.168.1.5:30000"
TRUSTED = ("--trusted-proxies", "10.0.0.0/8,::1")


def scope_of(
    headers: dict[str, str] | list[tuple[bytes, bytes]],
    client: str | None = PROXY,
    server: tuple[str, int | None] | None = ("192.168.1.5", 30000),
    root_path: str = "",
) -> dict:
    if isinstance(headers, dict):
        headers = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    return {
        "type": "http",
        "scheme": "http",
        "client": client and (client, 4711),
        "server": server,
        "root_path": root_path,
        "headers": headers,
    }


def base_url(headers: dict[str, str] | list[tuple[bytes, bytes]], *flags: str, **scope) -> str:
    return PublicAddress(load_settings([*flags])).base_url(scope_of(headers, **scope))


def origins(headers: dict[str, str], *flags: str, **scope) -> set[str]:
    return PublicAddress(load_settings([*flags])).origins(scope_of(headers, **scope))


def test_pages_of_our_own_come_from_where_the_client_asked_and_from_where_urls_lead():
    asked = {"host": "Images.example:8080"}
    hosts = {"http://images.example:8080", "https://images.example:8080"}
    assert origins(asked, client=CLIENT) == {*hosts, OWN}
    public = ("--public-url", "https://krea.example/images")
    assert origins(asked, *public) == {*hosts, "https://krea.example"}
    forwarded = {**asked, "x-forwarded-host": "a.example", "x-forwarded-proto": "https"}
    assert origins(forwarded, *TRUSTED) == {*hosts, "https://a.example"}
    assert "https://a.example" not in origins(forwarded, *TRUSTED, client=CLIENT)


def test_what_is_no_host_is_nobodys_origin():
    assert origins({"host": "a b"}, client=CLIENT, server=None) == set()


FORWARDED = {
    "host": "evil.example",
    "x-forwarded-host": "evil.example",
    "x-forwarded-proto": "https",
    "x-forwarded-port": "666",
    "x-forwarded-prefix": "/evil",
    "forwarded": "for=10.0.0.9;host=evil.example;proto=https",
}


@pytest.mark.parametrize("client", [CLIENT, "127.0.0.1", "11.0.0.7", "::2", None, "nonsense"])
def test_nobody_but_a_trusted_proxy_says_where_urls_lead(client):
    assert base_url(FORWARDED, *TRUSTED, client=client) == OWN


def test_nobody_is_trusted_by_default():
    assert base_url(FORWARDED) == base_url(FORWARDED, client="127.0.0.1") == OWN


@pytest.mark.parametrize(
    ("headers", "url"),
    [
        ({"x-forwarded-host": "a.example"}, "http://a.example"),
        ({"x-forwarded-host": "A.Example", "x-forwarded-proto": "HTTPS"}, "https://a.example"),
        ({"x-forwarded-host": "a.example:8443", "x-forwarded-proto": "https"}, "a.example:8443"),
        ({"x-forwarded-host": "a.example:443", "x-forwarded-proto": "https"}, "https://a.example"),
        ({"x-forwarded-host": "a.example", "x-forwarded-port": "8080"}, "http://a.example:8080"),
        ({"x-forwarded-host": "a.example:1", "x-forwarded-port": "2"}, "http://a.example:1"),
        ({"x-forwarded-host": "a.example", "x-forwarded-port": "80"}, "http://a.example"),
        ({"x-forwarded-host": "[2001:DB8:0::1]:90"}, "http://[2001:db8::1]:90"),
        ({"x-forwarded-host": "a.example", "x-forwarded-prefix": "/x/y/"}, "http://a.example/x/y"),
        ({"x-forwarded-host": "a.example", "x-forwarded-prefix": "/"}, "http://a.example"),
        # Envoy and load balancers leave the host as it was asked for, and say the rest.
        ({"host": "a.example", "x-forwarded-proto": "https"}, "https://a.example"),
        ({"host": "a.example", "x-forwarded-proto": "https", "x-forwarded-port": "444"}, ":444"),
        ({"host": "inner", "x-forwarded-host": "a.example"}, "http://a.example"),
        # Of a list, the end.
        ({"x-forwarded-host": "evil.example, a.example"}, "http://a.example"),
        (
            {"x-forwarded-host": "a.example", "x-forwarded-proto": "http , https"},
            "https://a.example",
        ),
        # RFC 7239.
        ({"forwarded": "for=203.0.113.9;host=a.example;proto=https"}, "https://a.example"),
        ({"forwarded": 'For="[2001:db8::1]:4711";HOST="a.example:81" ; by=x'}, "a.example:81"),
        ({"forwarded": r'host="a.ex\ample"'}, "http://a.example"),
        ({"forwarded": "proto=https", "host": "a.example"}, "https://a.example"),
        # What the others say comes first: most proxies know nothing of this one.
        ({"forwarded": "host=evil.example", "x-forwarded-host": "a.example"}, "http://a.example"),
    ],
)
def test_a_trusted_proxy_says_what_urls_begin_with(headers, url):
    found = base_url(headers, *TRUSTED)
    assert found == url if "//" in url else found.endswith(url)


def test_a_header_that_comes_twice_is_one_list():
    twice = [(b"x-forwarded-host", b"evil.example"), (b"x-forwarded-host", b"a.example")]
    assert base_url(twice, *TRUSTED) == "http://a.example"


@pytest.mark.parametrize(
    ("hops", "url"),
    [
        # The client's own invention, then two trusted proxies.
        (
            f"for=1.2.3.4;host=evil.example, for={CLIENT};host=a.example;proto=https, "
            f"for={EDGE};host=inner;proto=http",
            "https://a.example",
        ),
        (f"for={CLIENT};host=evil.example, for={CLIENT};host=a.example", "http://a.example"),
        (f'for="{EDGE}:99";host=a.example', "http://a.example"),
        ('for=unknown;host=evil.example, for="[::1]";host=b, for=_hidden;host=a', "http://a"),
        ('for=unknown;host=a.example, for="[::1]:80";host=inner', "http://a.example"),
    ],
)
def test_of_forwardeds_hops_it_is_the_first_that_is_no_trusted_proxys(hops, url):
    assert base_url({"forwarded": hops}, *TRUSTED) == url


MALFORMED_HOSTS = [
    "user@evil.example",
    "user:pass@evil.example",
    "evil.example/path",
    "evil.example?x",
    "evil.example#x",
    "evil.example\\x",
    "evil example",
    "evil.example\r\nx: y",
    "evil.example\nx",
    "evil.example\t",
    "evil.example\x00",
    "evil..example",
    ".evil.example",
    "-evil.example-",
    "evil.example:",
    "evil.example:0",
    "evil.example:99999",
    "evil.example:1e3",
    "evil.example:٣",
    "evil.example:80:80",
    "https://evil.example",
    "//evil.example",
    "évil.example",
    "[evil]",
    "[::1",
    "::1",
    "[::1%25eth0]",
    "[1.2.3.4]",
    "%65vil.example",
    "evil.example,",
    "<script>",
    '"evil.example"',
    "a" * 300,
]


@pytest.mark.parametrize("text", MALFORMED_HOSTS)
@pytest.mark.parametrize("name", ["x-forwarded-host", "host"])
def test_what_is_no_host_reaches_no_url(name, text, caplog):
    raw = [(name.encode(), text.encode())]
    stripped = text.strip()
    if name == "x-forwarded-host" and stripped != text:
        # White space around an item of a list is none of its own.
        raw = [(name.encode(), b"x" + text.encode() + b"x")]
    assert base_url(raw, *TRUSTED) == OWN
    if name == "x-forwarded-host":
        assert "x-forwarded-host header is malformed" in caplog.text
        assert "evil" not in caplog.text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x-forwarded-proto", "javascript"),
        ("x-forwarded-proto", "https://x"),
        ("x-forwarded-port", "-1"),
        ("x-forwarded-port", "0"),
        ("x-forwarded-port", "65536"),
        ("x-forwarded-port", "8" * 5000),
        ("x-forwarded-port", "80/x"),
        ("x-forwarded-prefix", "evil"),
        ("x-forwarded-prefix", "//evil.example"),
        ("x-forwarded-prefix", "/a//b"),
        ("x-forwarded-prefix", "/a/../b"),
        ("x-forwarded-prefix", "/./b"),
        ("x-forwarded-prefix", "/a?b"),
        ("x-forwarded-prefix", "/a#b"),
        ("x-forwarded-prefix", "/a b"),
        ("x-forwarded-prefix", "/a\r\nb"),
        ("x-forwarded-prefix", "/%2e%2e"),
        ("x-forwarded-prefix", "/a" * 500),
        ("x-forwarded-prefix", "/é"),
        ("forwarded", "nonsense"),
        ("forwarded", "host=b.example;host=c.example"),
        ("forwarded", 'host="b.example'),
        ("forwarded", 'host="b.example"c'),
        ("forwarded", "host=b.example;;proto=https"),
        ("forwarded", "host=b.example, "),
        ("forwarded", "host=user@b.example"),
        ("forwarded", 'host="b.example/x"'),
        ("forwarded", "host = b.example"),
        ("forwarded", "proto=ftp"),
        ("forwarded", "for=10.0.0.9," * 5000),
    ],
)
def test_a_malformed_header_says_nothing_and_is_told(name, text, caplog):
    assert base_url({"host": "a.example", name: text}, *TRUSTED) == "http://a.example"
    assert f"a trusted proxy's {name} header is malformed" in caplog.text


NAMES = sorted(FORWARDED)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([name.encode() for name in NAMES]),
            st.binary(max_size=40)
            | st.text('/.:[]"=;, \\@a1-%', max_size=30).map(lambda text: text.encode()),
        ),
        max_size=6,
    )
)
def test_whatever_comes_a_url_begins_as_a_url(headers):
    url = base_url(headers, *TRUSTED)
    assert re.fullmatch(
        r"https?://([a-z0-9_][a-z0-9_.-]*|\[[0-9a-f:.]+\])(:[1-9][0-9]{0,4})?(/[A-Za-z0-9._~-]+)*",
        url,
    )


@pytest.mark.parametrize(
    ("host", "url"),
    [
        # Where a port is mapped, this machine knows nothing of it, and nobody else is reached.
        ("localhost:8080", "http://localhost:8080"),
        ("127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("[::1]:8080", "http://[::1]:8080"),
        ("127.0.0.1", "http://127.0.0.1"),
        ("localhost.evil.example", OWN),
        ("127.0.0.1.evil.example", OWN),
        ("10.0.0.99", OWN),
    ],
)
def test_the_local_host_may_be_asked_by_any_port(host, url):
    assert base_url({"host": host}, client=CLIENT) == url


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("a.example", True),
        ("A.example.", True),
        ("a.example:8443", True),
        ("x.b.example", True),
        ("x.y.b.example", True),
        ("b.example", False),
        ("xb.example", False),
        ("a.example.evil.example", False),
        ("evil-a.example", False),
        ("a.example@evil.example", False),
    ],
)
@pytest.mark.parametrize("client", [CLIENT, PROXY])
def test_allowed_hosts_may_be_asked_and_no_other(host, allowed, client):
    flags = (*TRUSTED, "--allowed-hosts", "a.example,*.b.example")
    found = base_url({"host": host}, *flags, client=client)
    assert found == (f"http://{host.lower()}" if allowed else OWN)
    # Not by way of a proxy that passes on whatever it is sent, either.
    if client == PROXY:
        sent = {"x-forwarded-host": host, "x-forwarded-proto": "https", "x-forwarded-prefix": "/p"}
        assert base_url(sent, *flags) == (f"https://{host.lower()}/p" if allowed else OWN)


def test_two_hosts_are_none():
    twice = [(b"host", b"localhost"), (b"host", b"localhost")]
    assert base_url(twice) == OWN


@pytest.mark.parametrize(
    ("server", "url"),
    [
        (("192.168.1.5", 80), "http://192.168.1.5"),
        (("2001:db8::5", 30000), "http://[2001:db8::5]:30000"),
        (("fe80::1%eth0", 30000), "http://[fe80::1]:30000"),
        (("::ffff:192.168.1.5", 30000), OWN),
        # By a Unix socket, or by nothing that is known: a path leads to wherever it was asked.
        (("/run/krea2.sock", None), ""),
        (None, ""),
    ],
)
def test_otherwise_it_is_the_address_that_the_connection_has_reached(server, url):
    assert base_url({"host": "a.example"}, client=CLIENT, server=server) == url
    assert base_url({}, client=CLIENT, server=server, root_path="/krea") == url + "/krea"


def test_an_address_of_ipv4_is_known_in_ipv6s_clothes():
    sent = {"x-forwarded-host": "a.example"}
    assert base_url(sent, *TRUSTED, client="::ffff:10.0.0.7") == "http://a.example"


def test_where_it_is_mounted_comes_behind_what_proxies_have_taken_off():
    sent = {"x-forwarded-host": "a.example", "x-forwarded-prefix": "/api"}
    assert base_url(sent, *TRUSTED, root_path="/krea") == "http://a.example/api/krea"


def test_the_public_url_is_all_there_is_to_say():
    url = "https://a.example/krea"
    assert base_url(FORWARDED, "--public-url", url + "/", root_path="/krea") == url


@pytest.mark.parametrize(
    ("flags", "warns"),
    [
        ([], False),
        (["--host", "0.0.0.0"], True),
        (["--host", "::"], True),
        (["--host", "192.168.1.5"], False),
        (["--host", "0.0.0.0", "--public-url", "https://a.example"], False),
        (["--host", "0.0.0.0", "--trusted-proxies", "10.0.0.7"], False),
        (["--host", "0.0.0.0", "--allowed-hosts", "a.example"], False),
        (["--host", "0.0.0.0", "--storage", "none"], False),
        (["--host", "0.0.0.0", "--storage", "s3://bucket/x"], False),
    ],
)
def test_a_server_that_may_give_urls_that_lead_nowhere_says_so(flags, warns):
    text = url_warning(load_settings(["--allow-anonymous", *flags]))
    assert bool(text) == warns
    assert not warns or "public_url" in text
