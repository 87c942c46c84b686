"""Images in a real S3 server, and URLs that it has signed."""

import asyncio
import logging
import os
import socket
from typing import Any
from urllib.parse import parse_qs, urlsplit

import fsspec
import fsspec.asyn
import httpx
import pytest

from krea2_server.storage.fsspec_store import FsspecStore
from krea2_server.storage.store import StorageError, put_all
from tests.channel import wait_until
from tests.server.storage.s3 import fsspec_store, is_clean, options, started
from tests.unit.server.storage.stores import BASE_URL

NO_RETRIES = {"retries": {"max_attempts": 0}}


def keys_in(endpoint, bucket) -> list[str]:
    files = fsspec.filesystem("s3", skip_instance_cache=True, **options(endpoint))
    return files.find(bucket)


@pytest.mark.parametrize(
    ("prefix", "extension"), [("", "png"), ("/", "jpeg"), ("/images", "webp"), ("/a/b/", "png")]
)
def test_a_signed_url_gives_the_image(endpoint, bucket, prefix, extension):
    async def check():
        async with fsspec_store(f"s3://{bucket}{prefix}", endpoint) as store:
            data = os.urandom(100_000)
            return data, await store.put(data, extension, BASE_URL)

    data, url = asyncio.run(check())
    found = httpx.get(url)
    assert found.status_code == 200
    assert found.content == data
    assert found.headers["content-type"] == f"image/{extension}"
    path = urlsplit(url).path
    assert path.startswith(f"/{bucket}{prefix.rstrip('/')}/")
    assert keys_in(endpoint, bucket) == [path[1:]]  # and no more: the start has left nothing


def test_urls_are_signed_in_the_current_way_for_as_long_as_was_said(endpoint, bucket):
    async def check():
        async with fsspec_store(f"s3://{bucket}", endpoint, expiry_s=1234.5) as store:
            return await store.put(b"x", "png", BASE_URL)

    query = parse_qs(urlsplit(asyncio.run(check())).query)
    assert query["X-Amz-Algorithm"] == ["AWS4-HMAC-SHA256"]
    assert query["X-Amz-Expires"] == ["1235"]


def test_many_at_once(endpoint, bucket):
    async def check():
        async with fsspec_store(f"s3://{bucket}", endpoint) as store:
            data = [os.urandom(1000) for _ in range(50)]
            urls = await asyncio.gather(*[store.put(each, "png", BASE_URL) for each in data])
            return data, urls

    data, urls = asyncio.run(check())
    assert len(set(urls)) == 50
    assert [httpx.get(url).content for url in urls] == data


def test_a_bucket_that_goes_away_is_an_error_and_no_end(endpoint, bucket, caplog):
    async def check():
        async with fsspec_store(f"s3://{bucket}", endpoint) as store:
            assert httpx.delete(f"{endpoint}/{bucket}").status_code == 204
            with pytest.raises(StorageError) as raised:
                await store.put(b"x", "png", BASE_URL)
            assert str(raised.value) == "the image could not be stored"
            assert httpx.put(f"{endpoint}/{bucket}").status_code == 200
            return await store.put(b"x", "png", BASE_URL)

    assert httpx.get(asyncio.run(check())).content == b"x"
    assert "NoSuchBucket" in caplog.text


@pytest.mark.parametrize("prefix", ["", "/images"])
def test_a_request_whose_images_are_not_all_stored_leaves_none(endpoint, bucket, prefix):
    async def check():
        async with fsspec_store(f"s3://{bucket}{prefix}", endpoint) as store:
            urls = await put_all(store, [b"a", b"b"], "png", BASE_URL)
            stored = asyncio.Event()

            async def put(data, extension, base_url):
                if not data:
                    await stored.wait()
                    raise StorageError("the image could not be stored")
                url = await type(store).put(store, data, extension, base_url)
                stored.set()
                return url

            store.put = put
            with pytest.raises(StorageError):
                await put_all(store, [b"c", b""], "png", BASE_URL)
            return urls

    urls = asyncio.run(check())
    assert keys_in(endpoint, bucket) == sorted(urlsplit(url).path[1:] for url in urls)


def test_an_image_without_a_url_is_not_kept(endpoint, bucket, monkeypatch):
    async def check():
        async with fsspec_store(f"s3://{bucket}", endpoint) as store:

            async def no_url(path):
                assert len(await asyncio.to_thread(keys_in, endpoint, bucket)) == 1
                raise PermissionError

            monkeypatch.setattr(store, "_sign", no_url)
            with pytest.raises(StorageError):
                await store.put(b"x", "png", BASE_URL)

    asyncio.run(check())
    assert keys_in(endpoint, bucket) == []


def started_with_bucket() -> tuple[Any, str, dict[str, Any]]:
    """A server that is to be stopped, where it is, and the options of a store in its bucket."""
    server, endpoint = started()
    assert httpx.put(f"{endpoint}/bucket").status_code == 200
    return server, endpoint, options(endpoint, config_kwargs=NO_RETRIES)


def test_what_cannot_be_removed_is_told_in_a_line(caplog):
    server, _, given = started_with_bucket()

    async def check():
        store = FsspecStore("s3://bucket", expiry_s=60, options=given)
        await store.start()
        url = await store.put(b"x", "png", BASE_URL)
        for _ in range(2):  # the second time it has gone already
            store.discard(url)
            await asyncio.to_thread(wait_until, lambda: not store._removals)
        assert "could not be removed" not in caplog.text
        await asyncio.to_thread(server.stop)
        store.discard(url)
        await store.close()

    asyncio.run(check())
    lines = [record.message for record in caplog.records if "removed" in record.message]
    assert lines == ["an image could not be removed: EndpointConnectionError"]


def test_a_server_that_is_gone_is_an_error_without_secrets(caplog):
    caplog.set_level(logging.INFO)
    server, endpoint, given = started_with_bucket()

    async def check():
        store = FsspecStore("s3://bucket", expiry_s=60, options=given)
        await store.start()
        await store.put(b"x", "png", BASE_URL)
        await asyncio.to_thread(server.stop)
        with pytest.raises(StorageError) as put:
            await store.put(b"x", "png", BASE_URL)
        with pytest.raises(StorageError) as start:
            await FsspecStore("s3://bucket", expiry_s=60, options=given).start()
        return str(put.value), str(start.value)

    put, start = asyncio.run(check())
    assert put == "the image could not be stored"
    assert start.startswith("storage: s3://bucket ")
    assert "EndpointConnectionError" in start
    assert "EndpointConnectionError" in caplog.text
    assert is_clean(start, caplog, endpoint)


def test_a_server_that_never_answers_is_given_up(endpoint, bucket):
    def uploads():
        return [
            task for task in asyncio.all_tasks(fsspec.asyn.get_loop()) if "_pipe_file" in repr(task)
        ]

    async def check(silent):
        store = FsspecStore("s3://bucket", expiry_s=60, options=options(silent), timeout_s=0.5)
        with pytest.raises(StorageError, match="TimeoutError"):
            await store.start()
        with pytest.raises(StorageError):
            await store.put(b"x", "png", BASE_URL)
        store._timeout_s = 600
        put = asyncio.create_task(store.put(b"x", "png", BASE_URL))
        await asyncio.to_thread(wait_until, uploads)
        put.cancel()
        await asyncio.gather(put, return_exceptions=True)
        assert put.cancelled()
        # Nothing goes on that nobody waits for.
        await asyncio.to_thread(wait_until, lambda: not uploads())

    with socket.create_server(("127.0.0.1", 0)) as listener:
        asyncio.run(check(f"http://127.0.0.1:{listener.getsockname()[1]}"))


def test_a_slow_server_does_not_block_the_event_loop():
    async def check():
        connected = asyncio.Event()

        class Silent(asyncio.Protocol):
            def connection_made(self, transport):
                connected.set()

        # On this event loop, which has to turn for a connection to be seen at all.
        server = await asyncio.get_running_loop().create_server(Silent, "127.0.0.1", 0)
        async with server:
            endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            store = FsspecStore("s3://bucket", expiry_s=60, options=options(endpoint))
            start = asyncio.create_task(store.start())
            await asyncio.wait_for(connected.wait(), 50)
            assert not start.done()
            start.cancel()
            await asyncio.gather(start, return_exceptions=True)
        assert start.cancelled()

    asyncio.run(check())


def test_only_images_are_stored(endpoint, bucket):
    async def check():
        async with fsspec_store(f"s3://{bucket}", endpoint) as store:
            await store.put(b"x", "../x", BASE_URL)

    with pytest.raises(ValueError, match="extension"):
        asyncio.run(check())
    assert keys_in(endpoint, bucket) == []
