"""A server that proxies stand before: whom it believes, and calls that are silent for long."""

import json
import re
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from krea2_srt.messages import EngineError
from tests.channel import PATIENCE_S, wait_until
from tests.server.nginx import Behind, nginx
from tests.server.serving import Api, Served, serve

BODY = {"prompt": "x", "size": "64x64", "seed": 7}
PATH = "/v1/images/generations"
FAILURE = EngineError("deadline_exceeded", "the deadline is over")


@pytest.fixture(scope="module")
def talkative(shared_engine, tmp_path_factory) -> Iterator[Served]:
    """A server that is never silent for long, and that believes proxies on this machine."""
    flags = (
        *("--engine-endpoints", shared_engine.endpoint, "--trusted-proxies", "127.0.0.1"),
        *("--keepalive-s", "0.1", "--json-keepalive-s", "0.1"),
    )
    with serve(tmp_path_factory.mktemp("talkative"), *flags) as server:
        yield server


def test_spaces_go_ahead_of_json_that_takes_its_time(talkative, engine):
    usual = talkative.post(**BODY).json()
    engine.hold.set()
    with httpx.stream("POST", talkative.url + PATH, json=BODY, timeout=300) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-accel-buffering"] == "no"
        chunks = answer.iter_raw()
        begun = next(chunks) + next(chunks)
        assert set(begun) == set(b" ")
        engine.hold.clear()
        body = begun + b"".join(chunks)
    assert json.loads(body)["data"] == usual["data"]


def test_what_is_quick_is_answered_as_ever(talkative, fake_server, engine):
    usual, quick = fake_server.post(**BODY), talkative.post(**BODY)
    assert quick.headers.keys() == usual.headers.keys()
    assert "content-length" in quick.headers
    assert quick.json()["data"] == usual.json()["data"]
    engine.error = FAILURE
    failed = talkative.post(**BODY)
    assert (failed.status_code, failed.json()["error"]["code"]) == (504, "deadline_exceeded")
    refused = talkative.post(**BODY, n=0)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")


def test_a_client_of_http_1_0_gets_its_json_alone(talkative, engine):
    """It knows no chunks, whose lengths would be in its JSON."""
    engine.step_s = 0.05
    content = json.dumps(BODY).encode()
    with socket.create_connection(("127.0.0.1", talkative.port)) as connection:
        connection.settimeout(PATIENCE_S)
        head = b"POST %s HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        connection.sendall(head % (PATH.encode(), len(content)) + content)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    headers, _, body = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in headers
    assert json.loads(body)["data"]
    assert body.startswith(b"{")


def test_a_failure_behind_spaces_is_told_and_is_no_answer(talkative, engine):
    before = talkative.metric("krea2_requests_total", outcome="deadline_exceeded")
    engine.hold.set()
    body = b""
    with httpx.stream("POST", talkative.url + PATH, json=BODY, timeout=300) as answer:
        engine.error = FAILURE
        engine.hold.clear()
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
            for chunk in answer.iter_raw():
                body += chunk
    error = json.loads(body)["error"]
    assert (error["code"], error["message"]) == ("deadline_exceeded", FAILURE.message)
    wait_until(
        lambda: talkative.metric("krea2_requests_total", outcome="deadline_exceeded") == before + 1
    )
    assert "Traceback" not in talkative.log


def test_hanging_up_among_spaces_cancels(talkative, engine):
    engine.hold.set()
    with httpx.stream("POST", talkative.url + PATH, json=BODY, timeout=300) as answer:
        next(answer.iter_raw())
    wait_until(lambda: engine.cancelled)
    assert not engine.waiting


def generated(api: Api, begun: Callable[[], object]) -> openai.types.ImagesResponse:
    """What the official client reads.

    Args:
        begun: called when an answer has begun, before its body is read.
    """
    with httpx.Client(timeout=300, event_hooks={"response": [lambda _: begun()]}) as client:
        return api.client(http_client=client).images.generate(prompt="x", size="64x64")


@pytest.fixture(scope="module")
def proxies(talkative, fake_server, tmp_path_factory) -> Iterator[dict[str, Api]]:
    """nginx as documented, and nginx that cuts after two silent seconds."""
    with nginx(
        tmp_path_factory.mktemp("nginx"),
        Behind(fake_server.url),
        Behind(fake_server.url, "2s"),
        Behind(talkative.url, "2s"),
    ) as (patient, cutting, kept):
        yield {"patient": patient, "cutting": cutting, "kept": kept}


def test_silent_calls_survive_a_proxy_that_waits_or_is_sent_something(proxies, engine):
    """The call that nginx cuts says when the others have lasted longer than it lets them."""
    engine.hold.set()
    with (
        ThreadPoolExecutor() as pool,
        httpx.stream(
            "POST", proxies["kept"].url + PATH, json={**BODY, "stream": True}, timeout=300
        ) as stream,
    ):
        try:
            others = [pool.submit(proxies[name].post, **BODY) for name in ("patient", "kept")]
            lines = stream.iter_lines()
            # At once: nginx does not collect it.
            assert next(lines).startswith(": queued")
            wait_until(lambda: engine.waiting == 3)
            cut = proxies["cutting"].post(**BODY)
            assert cut.status_code == 504
            assert "nginx" in cut.text
            wait_until(lambda: len(engine.cancelled) == 1)
            assert engine.waiting == 3
        finally:
            engine.hold.clear()
        answers = [other.result() for other in others]
        streamed = "\n".join(lines)
    assert [answer.status_code for answer in answers] == [200, 200]
    assert all(answer.json()["data"][0]["b64_json"] for answer in answers)
    assert "event: image_generation.completed" in streamed


@pytest.mark.parametrize("way", ["direct", "kept"])
def test_the_official_client_reads_json_behind_spaces(talkative, request, engine, way):
    api = talkative if way == "direct" else request.getfixturevalue("proxies")[way]
    engine.hold.set()
    assert generated(api, engine.hold.clear).data[0].b64_json


@pytest.mark.parametrize("way", ["direct", "kept"])
def test_to_the_official_client_a_failure_there_is_a_lost_connection(
    talkative, request, engine, way
):
    api = talkative if way == "direct" else request.getfixturevalue("proxies")[way]

    def fail() -> None:
        engine.error = FAILURE
        engine.hold.clear()

    engine.hold.set()
    with pytest.raises(openai.APIConnectionError):
        generated(api, fail)
    assert len(engine.requests) == 1


FORGED = {
    "host": "evil.example",
    "x-forwarded-for": "127.0.0.1",
    "x-forwarded-host": "evil.example",
    "x-forwarded-port": "1",
    "x-forwarded-proto": "https",
    "x-forwarded-prefix": "/evil",
    "forwarded": "for=127.0.0.1;host=evil.example;proto=https",
}


@pytest.mark.parametrize("stream", [False, True])
def test_a_url_leads_here_whatever_a_client_calls_this_server(fake_server, engine, stream):
    answer = fake_server.post(FORGED, **BODY, response_format="url", stream=stream)
    assert "evil" not in answer.text
    (url,) = re.findall(r'"url":"(.*?)"', answer.text)
    assert url.startswith(f"{fake_server.url}/v1/images/files/")
    assert httpx.get(url, timeout=60).status_code == 200


@pytest.mark.parametrize("name", sorted(FORGED))
@pytest.mark.parametrize(
    "text", ["", ",", "a b", "\xff", "a\tb", "/../..", "user@evil.example", '"', "=" * 9000, "[::1"]
)
def test_no_proxy_can_break_a_request_or_a_url(talkative, engine, name, text):
    headers = {name: text.encode("latin-1")}
    answer = talkative.post(headers, **BODY, response_format="url")
    assert answer.status_code == 200, answer.text
    url = answer.json()["data"][0]["url"]
    assert url.startswith(f"{talkative.url}/v1/images/files/")
    assert "Traceback" not in talkative.log


@pytest.mark.parametrize("prefix", ["", "/krea"])
def test_urls_are_those_by_which_nginx_is_reached(proxies, engine, prefix):
    proxy = proxies["kept"]
    port = proxy.url.rsplit(":", 1)[1]
    said = {**FORGED, "host": "images.example"}
    answer = httpx.post(
        proxy.url + prefix + PATH, json={**BODY, "response_format": "url"}, headers=said, timeout=60
    )
    url = answer.json()["data"][0]["url"]
    begin = f"http://images.example:{port}"
    assert url.startswith(f"{begin}{prefix}/v1/images/files/")
    file = httpx.get(proxy.url + url.removeprefix(begin), timeout=60)
    assert (file.status_code, file.headers["content-type"]) == (200, "image/png")
