"""Whatever is sent: an answer in OpenAI's form, and a server that goes on."""

import json
import socket
import time
from contextlib import suppress

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from krea2_server.api.schemas import ErrorResponse, ImageGenerationRequest, ImagesResponse
from tests.channel import PATIENCE_S
from tests.server.serving import serve

KEY = "sk-0123456789abcdef"
JSON = {"content-type": "application/json"}
POST = b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


def check_error(response: httpx.Response, status: int | None = None) -> dict:
    """An error that keeps all promises; returns its content."""
    assert 400 <= response.status_code < 500, response.text
    assert status is None or response.status_code == status, response.text
    assert response.headers["x-request-id"].startswith("req_")
    assert response.headers["content-type"] == "application/json"
    ErrorResponse.model_validate(response.json())
    assert "Traceback" not in response.text
    return response.json()["error"]


def still_works(server) -> None:
    assert server.post(prompt="a normal request", size="64x64").status_code == 200


def post(server, content: bytes, headers=JSON) -> httpx.Response:
    url = f"{server.url}/v1/images/generations"
    return httpx.post(url, content=content, headers=headers, timeout=300)


IMPOSSIBLE = [
    {"size": "0x0"},
    {"size": "255x"},
    {"size": "100000x100000"},
    {"width": 10**30, "height": 16},
    {"num_inference_steps": 10**8},
    {"n": 999},
    {"n": 0},
    {"n": True},
    {"n": 1.5},
    {"n": "two"},
    {"prompt": ""},
    {"prompt": None},
    {"prompt": "\x00"},
    {"prompt": "a\x00b"},
    {"prompt": ["a", "b"]},
    {"prompt": {"$ne": 1}},
    {"prompt": "x" * 32_001},
    {"seed": -2},
    {"seed": 2**63},
    {"seed": 10**400},
    {"guidance_scale": "high"},
    {"guidance_scale": -1},
    {"deadline_ms": 0},
    {"deadline_ms": 10**12},
    {"priority": 11},
    {"stream": "yes"},
    {"partial_images": 4, "stream": True},
    {"output_compression": 101, "output_format": "jpeg"},
    {"user": "u" * 513},
    {"output_format": "../../etc/passwd"},
    {"model": "../../etc/passwd"},
    {"model_path": "/etc"},
    {"output_path": "/etc/cron.d", "output_file_name": "x"},
    {"save_output": True},
    {"profile": True},
    {"diffusers_kwargs": {"a": 1}},
    {"__class__": "x"},
    {"image": "aGVsbG8="},
]


@pytest.mark.parametrize("fields", IMPOSSIBLE, ids=lambda fields: next(iter(fields)))
def test_impossible_values_are_refused_and_never_reach_the_engine(fake_server, engine, fields):
    response = fake_server.post(**{"prompt": "x", "size": "64x64", **fields})
    error = check_error(response)
    assert error["param"] in {*fields, "size"}
    assert not engine.requests
    still_works(fake_server)


NO_REQUESTS = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"\xff\xfe",
    b"{'prompt': 'x'}",
    b'{"prompt": NaN}',
    b'{"prompt": "x", "guidance_scale": NaN}',
    b'{"prompt": "x", "guidance_scale": Infinity}',
    b'{"prompt": "x", "seed": 1e999}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "x", "\\ud800": 1}',
    b'{"prompt": "x", "parameters": {"\\ud800": 2}, "extra": {"\\ud800": 3}}',
    b'{"prompt": "x", "seed": ' + b"9" * 100_000 + b"}",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"prompt": "x", "user": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
]


@pytest.mark.parametrize("content", NO_REQUESTS, ids=lambda content: content[:24].decode("latin-1"))
def test_bodies_that_are_no_request(fake_server, engine, content):
    check_error(post(fake_server, content), 400)
    still_works(fake_server)


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_only_json_is_read(fake_server, engine, media_type):
    """A page on another site could send anything else without being asked."""
    headers = {"content-type": media_type} if media_type else {}
    check_error(post(fake_server, b'{"prompt": "x", "size": "64x64"}', headers), 400)


@pytest.mark.parametrize("text", ["\x1b[2J", "a\r\nb", "\u202e", "🦊" * 100, "\ufffe"])
def test_any_text_is_a_prompt(fake_server, engine, text):
    assert fake_server.post(prompt=text, size="64x64").status_code == 200
    assert engine.requests[-1].image.prompt == text


def test_a_body_of_10_mb_is_refused_before_it_is_read(fake_server, engine):
    body = json.dumps({"prompt": "x" * 10_000_000}).encode()
    check_error(post(fake_server, body), 413)

    def chunks():
        for _ in range(1000):
            yield b"x" * 10_000

    with httpx.Client() as client:
        try:
            response = client.post(
                f"{fake_server.url}/v1/images/generations", content=chunks(), headers=JSON
            )
        except httpx.WriteError:  # it hung up on us while we were sending
            pass
        else:
            check_error(response, 413)
    still_works(fake_server)


@pytest.mark.parametrize(
    "path",
    [
        "/nope",
        "/v1/images/edits",
        "/v1/images/variations",
        "/v1/chat/completions",
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/v1/images/files/..%2f..%2fetc%2fpasswd",
        "/v1/images/files/%00",
        "/v1/images/files/" + "a" * 5000,
        "/v1/images/files/" + "0" * 32 + ".png?expires=9999999999&signature=" + "0" * 64,
        "/v1/images/files/" + "0" * 32 + ".png?expires=-1&signature=%ff",
        "/v1/images/files/" + "0" * 32 + ".png",
        "/v1/models/%2e%2e%2fx",
        "/playground/..%2f..%2fsettings.py",
        "/update_weights_from_disk",
        "/%ff%fe",
    ],
)
def test_paths_that_lead_nowhere(fake_server, engine, path):
    check_error(httpx.get(fake_server.url + path), 404)
    still_works(fake_server)


def test_wrong_methods(fake_server, engine):
    error = check_error(httpx.get(f"{fake_server.url}/v1/images/generations"), 405)
    assert error["code"] == "method_not_allowed"
    assert "POST" in httpx.put(f"{fake_server.url}/v1/images/generations").headers["allow"]
    check_error(httpx.delete(f"{fake_server.url}/v1/models"), 405)
    check_error(httpx.request("PROPFIND", f"{fake_server.url}/"), 405)
    still_works(fake_server)


def raw(server, data: bytes) -> bytes:
    """What comes back on a connection of its own, until the server closes it."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(PATIENCE_S)
        received = b""
        with suppress(ConnectionError):
            connection.sendall(data)
            while chunk := connection.recv(65536):
                received += chunk
        return received


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01", b"400"),
        (b"hello\r\n\r\n", b"400"),
        (b"GET / HTTP/9.9\r\n\r\n", b"400"),
        (b"GET \xff\xfe HTTP/1.1\r\n\r\n", b"400"),
        (b"POST /v1/images/generations HTTP/1.1\r\ncontent-length: x\r\n\r\n", b"400"),
        (b"POST /v1/images/generations HTTP/1.1\r\ncontent-length: -5\r\n\r\n", b"400"),
        (b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n", b"431"),
        (b"GET / HTTP/1.1\r\nx: " + b"a" * 2_000_000 + b"\r\n\r\n", b"431"),
        (b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 100_000 + b"\r\n", b"431"),
        (b"GET / HTTP/1.1\r\n" + b"x" * 2_000_000, b"431"),
    ],
    ids=lambda value: value[:20].decode("latin-1") if len(value) > 3 else None,
)
def test_what_is_hardly_http(fake_server, engine, data, status):
    answer = raw(fake_server, data)
    # A client that goes on sending may find its connection reset before it has read.
    if answer:
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.split()[1] == status
        assert b"x-request-id: req_" in head
        ErrorResponse.model_validate_json(body)
    else:
        assert len(data) > 100_000
    still_works(fake_server)


@pytest.mark.parametrize("path", ["edits", "variations"])
def test_edits_are_refused_whatever_is_sent_for_them(fake_server, engine, path):
    url = f"{fake_server.url}/v1/images/{path}"
    picture = {"image": ("fox.png", b"x" * 5_000_000, "image/png")}
    for response in (
        httpx.post(url, json={"prompt": "x"}),
        httpx.post(url, data={"prompt": "x"}, files=picture),
    ):
        error = check_error(response, 400)
        assert error["code"] == "unsupported_operation"
        assert "cannot be edited" in error["message"]
    with pytest.raises(openai.BadRequestError, match="cannot be edited"):
        fake_server.client().images.edit(image=b"x" * 3_000_000, prompt="x")
    still_works(fake_server)


@pytest.fixture(scope="module")
def guarded(shared_engine, tmp_path_factory):
    """A server with a key, which waits a second for headers and lets unknown fields through."""
    flags = ["--engine-endpoints", shared_engine.endpoint, "--header-timeout-s", "1"]
    flags += ["--allow-unknown-fields"]
    environment = {"KREA2_SERVE_API_KEYS": KEY}
    folder = tmp_path_factory.mktemp("guarded")
    with serve(folder, *flags, environment=environment) as server:
        yield server


def test_an_answer_before_the_body_is_the_only_one(guarded, engine):
    """And what comes of the body later is not taken for another request."""
    head = b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-length: 60000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", guarded.port)) as connection:
        connection.settimeout(PATIENCE_S)
        connection.sendall(head + b"x" * 100)
        received = connection.recv(65536)
        with suppress(ConnectionError):
            for _ in range(10):
                connection.sendall(b"x" * 6000)
                time.sleep(0.05)
            while chunk := connection.recv(65536):
                received += chunk
        assert received.count(b"HTTP/1.1") == 1
        assert b"HTTP/1.1 401" in received
        assert b"connection: close" in received


def test_a_large_request_may_wait_behind_another_on_its_connection(fake_server, engine):
    engine.step_s = 0.05
    small = b'{"prompt": "x", "size": "64x64"}'
    large = json.dumps({"prompt": "x" * 30_000, "size": "64x64"}).encode() + b" " * 30_000
    with socket.create_connection(("127.0.0.1", fake_server.port)) as connection:
        connection.settimeout(PATIENCE_S)
        connection.sendall(POST + b"content-length: %d\r\n\r\n" % len(small) + small)
        close = b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(large)
        connection.sendall(POST + close)
        for start in range(0, len(large), 5000):
            connection.sendall(large[start : start + 5000])
            time.sleep(0.02)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    assert received.count(b"HTTP/1.1 200") == received.count(b"HTTP/1.1") == 2


def test_trailers_without_an_end_are_cut_off(fake_server, engine):
    head = b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    answer = raw(fake_server, head + b"2\r\n{}\r\n0\r\nx: " + b"y" * 5_000_000)
    assert not answer or answer.startswith(b"HTTP/1.1 431")
    still_works(fake_server)


def test_two_requests_in_one_packet_both_get_an_answer(fake_server, engine):
    body = b'{"prompt": "x", "size": "64x64"}'
    one = POST + b"content-length: %d\r\n\r\n" % len(body) + body
    answer = raw(fake_server, one + one.replace(b"host: x", b"connection: close"))
    assert answer.count(b"HTTP/1.1 200") == 2


FIELDS = {name: st.none() for name in ImageGenerationRequest.model_fields} | {
    "prompt": st.text(max_size=50),
    "n": st.integers(-2, 4),
    "size": st.sampled_from(["auto", "64x64", "64x96", "17x17", "1x1", "x", ""]),
    "quality": st.sampled_from(["low", "auto", "best"]),
    "seed": st.integers(-1, 2**64),
    "guidance_scale": st.floats(),
    "num_inference_steps": st.integers(-1, 300),
    "stream": st.booleans(),
    "output_format": st.sampled_from(["png", "jpeg", "webp", "gif"]),
    "output_compression": st.integers(-1, 101),
}


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: st.one_of(values, st.none(), st.integers(), st.text(max_size=8))
            for name, values in FIELDS.items()
        },
    )
)
def test_any_mixture_of_values_gets_an_answer_that_fits(fake_server, engine, fields):
    content = json.dumps(fields).encode(errors="surrogatepass")
    response = post(fake_server, content)
    if response.status_code == 200:
        if fields.get("stream"):
            assert "event: image_generation.completed" in response.text
        else:
            ImagesResponse.model_validate_json(response.content)
    else:
        check_error(response)


def test_unknown_fields_can_be_let_through_but_impossible_ones_cannot(guarded, engine):
    key = {"authorization": f"Bearer {KEY}"}
    assert guarded.post(key, prompt="x", size="64x64", no_such_field=1).status_code == 200
    check_error(guarded.post(key, prompt="x", size="64x64", image="x"), 400)


def test_an_offer_of_another_protocol_is_passed_over(fake_server, engine):
    """Java's client makes it with every first request."""
    body = b'{"prompt": "x", "size": "64x64"}'
    offer = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n"
    post = POST + offer + b"content-length: %d\r\n\r\n" % len(body)
    last = offer.replace(b"Upgrade,", b"Upgrade, close,")
    with socket.create_connection(("127.0.0.1", fake_server.port)) as connection:
        connection.settimeout(PATIENCE_S)
        connection.sendall(post)
        time.sleep(0.1)
        connection.sendall(body + b"GET /health HTTP/1.1\r\nhost: x\r\n" + last + b"\r\n")
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    assert answer.count(b"HTTP/1.1 200") == 2
    assert answer.endswith(b'{"status":"ok"}')
    refused = raw(fake_server, b"CONNECT x:443 HTTP/1.1\r\nhost: x\r\n\r\n")
    assert refused.startswith(b"HTTP/1.1 400")


def test_health_can_be_asked_by_its_head_alone(fake_server, engine):
    for path in ("/health", "/ready"):
        answer = httpx.head(fake_server.url + path)
        assert (answer.status_code, answer.content) == (200, b"")


def test_offers_in_a_row_and_what_comes_after_the_last_request(fake_server, engine):
    offer = b"connection: Upgrade\r\nupgrade: h2c\r\n"
    get = b"GET /health HTTP/1.1\r\nhost: x\r\n"
    last = get + b"connection: Upgrade, close\r\nupgrade: h2c\r\n\r\n"
    answer = raw(fake_server, (get + offer + b"\r\n") * 600 + last + b"more than that")
    assert answer.count(b"HTTP/1.1 200") == 601


def test_empty_lines_do_not_keep_a_connection_open(guarded, engine):
    with socket.create_connection(("127.0.0.1", guarded.port)) as connection:
        connection.settimeout(PATIENCE_S)
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = b""
        while b'{"status":"ok"}' not in answer:
            answer += connection.recv(65536)
        connection.sendall(b"\r\n")
        assert connection.recv(65536) == b""  # and not an answer to nothing


def test_trailers_say_nothing_of_their_request(fake_server, engine):
    body = b'{"prompt": "x", "size": "64x64", "response_format": "url"}'
    head = b"POST /v1/images/generations HTTP/1.1\r\ncontent-type: application/json\r\n"
    chunked = b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n%x\r\n" % len(body)
    answer = raw(fake_server, head + chunked + body + b"\r\n0\r\nhost: evil.example\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"evil.example" not in answer


def test_a_name_that_is_no_text_is_refused_like_any_other(fake_server, engine):
    for name in (b"\\ud800", b"\\ude00abc"):
        error = check_error(post(fake_server, b'{"prompt": "x", "' + name + b'": 1}'), 400)
        assert error["code"] == "unknown_parameter"


def test_such_a_name_inside_a_clients_own_object_is_named(guarded, engine):
    headers = {**JSON, "authorization": f"Bearer {KEY}"}
    content = b'{"prompt": "x", "size": "64x64", "extra": {"\\ud800": 1}}'
    answer = post(guarded, content, headers)
    assert (answer.status_code, len(answer.json()["warnings"])) == (200, 1)


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (b"transfer-encoding: chunked", b"zz\r\n"),
        (b"transfer-encoding: chunked", b"-1\r\n"),
        (b"transfer-encoding: chunked", b"fffffffffffffffffff\r\n"),
        (b"transfer-encoding: chunked", b"2\r\n{}\r\n0\r\ncontent-length: 3\r\n\r\n"),
        (b"transfer-encoding: xchunked", b""),
    ],
)
def test_a_broken_body_is_answered(fake_server, engine, header, body):
    answer = raw(fake_server, POST + header + b"\r\n\r\n" + body)
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.1") == 1
    still_works(fake_server)


def test_junk_behind_a_request_does_not_take_its_answer(fake_server, engine):
    engine.step_s = 0.01
    body = b'{"prompt": "x", "size": "64x64"}'
    for good in (
        b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n",
        POST + b"content-length: %d\r\n\r\n" % len(body) + body,
    ):
        answer = raw(fake_server, good + b"JUNK\r\n\r\n" + b"\xff" * 1000)
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.count(b"HTTP/1.1") == 1
    still_works(fake_server)
