"""Images as URLs, on the whole server: a folder, a disk that is full, and S3."""

import os

import httpx
import pytest

from tests.channel import wait_until
from tests.server.serving import serve

FIELDS = {"prompt": "x", "size": "64x64", "response_format": "url"}


def url_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["data"][0]["url"]


@pytest.mark.slow
def test_a_url_ends_with_its_time_and_outlives_a_restart(shared_engine, engine, tmp_path):
    flags = ["--engine-endpoints", engine.endpoint, "--storage", str(tmp_path / "images")]
    with serve(tmp_path / "first", *flags, "--url-expiry-s", "3600") as server:
        url = url_of(server.post(**FIELDS, stream=False))
        found = httpx.get(url)
        assert found.status_code == 200
        assert found.headers["cache-control"].startswith("private, immutable, max-age=")
        assert found.headers["x-content-type-options"] == "nosniff"
        port = server.port
    with serve(tmp_path / "second", *flags, "--url-expiry-s", "1") as server:
        again = httpx.get(url.replace(f":{port}/", f":{server.port}/"))
        assert again.content == found.content
        short = url_of(server.post(**FIELDS))
        wait_until(lambda: httpx.get(short).status_code != 200)
        gone = httpx.get(short)
        assert gone.status_code == 410
        assert gone.json()["error"]["code"] == "expired"


def test_urls_are_as_clients_reach_the_server(shared_engine, engine, tmp_path):
    flags = ["--engine-endpoints", engine.endpoint, "--public-url", "https://images.example/krea/"]
    with serve(tmp_path, *flags) as server:
        url = url_of(server.post(**FIELDS))
        assert url.startswith("https://images.example/krea/v1/images/files/")


def test_a_stream_can_end_in_urls(fake_server, engine):
    stream = fake_server.client().images.generate(**FIELDS, n=2, stream=True, partial_images=1)
    *partial, first, second = list(stream)
    assert all(event.b64_json for event in partial)  # previews are not worth a file
    urls = [event.model_extra["url"] for event in (first, second)]
    assert len(set(urls)) == 2
    assert all(httpx.get(url).status_code == 200 for url in urls)


def test_a_full_disk_is_told_and_the_server_goes_on(shared_engine, engine, small_disk, tmp_path):
    storage = small_disk / "images"
    flags = ["--engine-endpoints", engine.endpoint, "--storage", str(storage)]
    with serve(tmp_path / "server", *flags) as server:
        engine.picture = os.urandom(700_000)
        # The first of two fits; without the second it is nobody's, and makes room again.
        assert server.post(**FIELDS, n=2).json()["error"]["code"] == "storage_full"
        wait_until(lambda: not list(storage.iterdir()))
        url = url_of(server.post(**FIELDS))
        full = server.post(**FIELDS)
        assert full.status_code == 503
        error = full.json()["error"]
        assert error["code"] == "storage_full"
        assert "b64_json" in error["message"]
        assert str(small_disk) not in full.text
        assert full.headers["x-should-retry"] == "true"
        streamed = server.post(**FIELDS, stream=True)
        assert "storage_full" in streamed.text
        inline = server.post(**{**FIELDS, "response_format": "b64_json"})
        assert inline.status_code == 200
        assert httpx.get(url).content == engine.picture
        engine.picture = os.urandom(100_000)
        assert httpx.get(url_of(server.post(**FIELDS))).content == engine.picture
        assert "Traceback" not in server.log


@pytest.fixture(scope="module")
def capped(shared_engine, tmp_path_factory):
    flags = ["--engine-endpoints", shared_engine.endpoint, "--max-storage-bytes", "250000"]
    with serve(tmp_path_factory.mktemp("capped"), *flags) as server:
        yield server


def test_a_cap_lets_the_oldest_go(capped, engine):
    engine.picture = os.urandom(100_000)
    first, second, third = (url_of(capped.post(**FIELDS)) for _ in range(3))
    assert httpx.get(first).status_code == 410
    assert httpx.get(second).content == httpx.get(third).content == engine.picture


def test_what_never_fits_is_not_tried_again(capped, engine):
    engine.picture = b"x" * 300_000
    full = capped.post(**FIELDS)
    assert full.status_code == 503
    assert full.headers["x-should-retry"] == "false"


def test_s3_serves_images_itself(shared_engine, engine, tmp_path, bucket, endpoint):
    flags = ["--engine-endpoints", engine.endpoint, "--storage", f"s3://{bucket}/krea/pictures"]
    options = f'{{"endpoint_url": "{endpoint}", "key": "test", "secret": "test-secret"}}'
    with serve(tmp_path, *flags, f"--storage-options={options}") as server:
        url = url_of(server.post(**FIELDS))
        assert url.startswith(endpoint)
        found = httpx.get(url)
        assert found.headers["content-type"] == "image/png"
        assert found.content.startswith(b"\x89PNG")
        # There are no files of the server's own, so there is no such route.
        assert server.get("/v1/images/files/x.png").status_code == 404
        assert "test-secret" not in server.log


def test_a_range_is_not_for_images(fake_server, engine):
    url = url_of(fake_server.post(**FIELDS))
    whole = httpx.get(url)
    for asked in ("bytes=0-3", "bytes=abc", "bytes=999999-", "items=0-1"):
        answer = httpx.get(url, headers={"range": asked})
        assert (answer.status_code, answer.content) == (200, whole.content)


def test_a_server_without_storage_has_no_urls(shared_engine, engine, tmp_path):
    with serve(tmp_path, "--engine-endpoints", engine.endpoint, "--storage", "none") as server:
        refused = server.post(**FIELDS)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "response_format"
        assert server.post(**{**FIELDS, "response_format": "b64_json"}).status_code == 200
        assert '"response_format": "url"' not in server.log
    assert not (tmp_path / "images").exists()
