"""Images in a folder: stored whole, found by their URLs, gone in time."""

import asyncio
import os
import re
import threading
from urllib.parse import urlsplit

import pytest

from krea2_server.storage.local import ExpiredFileError
from krea2_server.storage.store import (
    ImagesTooLargeError,
    StorageError,
    StorageFullError,
    put_all,
)
from tests.channel import PATIENCE_S
from tests.unit.server.storage.stores import (
    BASE_URL,
    Clock,
    bytes_in,
    file_of,
    holds,
    local_store,
    parts,
    read,
)


async def until(condition):
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


class StuckDisk:
    """An fsync that comes back when it is let go."""

    def __init__(self):
        self.num_stuck = 0
        self._freed = threading.Event()

    def fsync(self, descriptor):
        self.num_stuck += 1
        assert self._freed.wait(PATIENCE_S), "nobody was there to let it go"

    def let_go(self):
        self._freed.set()


@pytest.mark.parametrize("extension", ["png", "jpeg", "webp"])
def test_an_image_comes_back_as_it_was(tmp_path, extension):
    async def check():
        async with local_store(tmp_path / "new" / "images") as store:
            data = os.urandom(5000)
            url = await store.put(data, extension, BASE_URL)
            name, expires, signature = parts(url)
            assert url.startswith(f"{BASE_URL}/v1/images/files/")
            assert re.fullmatch(rf"[0-9a-f]{{32}}\.{extension}", name)
            for expiry in (expires, int(expires)):
                found = await store.get(name, expiry, signature)
                with found.file as file:
                    assert file.read() == data
                assert found.size == len(data)
                assert 99 <= found.remaining_s <= 101
                assert found.media_type == f"image/{extension}"

    asyncio.run(check())


def test_the_path_of_urls_is_the_servers_choice(tmp_path):
    async def check():
        async with local_store(tmp_path, path="/pictures") as store:
            assert urlsplit(await store.put(b"x", "png", BASE_URL)).path.startswith("/pictures/")

    asyncio.run(check())


def test_only_images_are_stored(tmp_path):
    async def check():
        async with local_store(tmp_path) as store:
            for extension in ("", "svg", "png/../../x", "PNG"):
                with pytest.raises(ValueError, match="extension"):
                    await store.put(b"x", extension, BASE_URL)
        assert not list(tmp_path.iterdir())

    asyncio.run(check())


def test_expired_images_are_refused_and_removed_by_the_next(tmp_path):
    async def check():
        clock = Clock()
        async with local_store(tmp_path, clock=clock) as store:
            early = await store.put(b"early", "png", BASE_URL)
            clock.now += 99
            assert await holds(store, early)
            late = await store.put(b"late", "png", BASE_URL)
            clock.now += 1
            assert not await holds(store, early)
            assert store.num_bytes == len(b"early" + b"late")
            last = await store.put(b"last", "png", BASE_URL)
            assert await holds(store, late)
            assert await holds(store, last)
            assert store.num_bytes == bytes_in(tmp_path) == len(b"late" + b"last")

    asyncio.run(check())


def test_expired_images_are_removed_without_another_image(tmp_path):
    async def check():
        clock = Clock()
        async with local_store(tmp_path, clock=clock, sweep_s=0.01) as store:
            await store.put(b"x", "png", BASE_URL)
            await asyncio.sleep(0.05)
            assert len(list(tmp_path.iterdir())) == 1
            clock.now += 100
            await until(lambda: not list(tmp_path.iterdir()) and not store.num_bytes)
            before = asyncio.all_tasks()
        assert len(asyncio.all_tasks()) == len(before) - 1  # the sweep has ended

    asyncio.run(check())


def test_beyond_the_limit_expired_images_go_first_and_then_the_oldest(tmp_path):
    async def check():
        clock = Clock()
        async with local_store(tmp_path, clock=clock, max_bytes=30) as store:
            urls = []
            for _ in range(3):
                urls.append(await store.put(b"0123456789", "png", BASE_URL))
                clock.now += 40
            # The first has expired at 100, now is 120: there is room without the second.
            urls.append(await store.put(b"0123456789", "png", BASE_URL))
            assert [await holds(store, url) for url in urls] == [False, True, True, True]
            urls.append(await store.put(b"0123456789abcdef", "png", BASE_URL))
            assert [await holds(store, url) for url in urls] == [False, False, False, True, True]
            assert store.num_bytes == bytes_in(tmp_path) == 26

    asyncio.run(check())


def test_an_image_larger_than_the_limit_removes_no_other(tmp_path):
    async def check():
        async with local_store(tmp_path, max_bytes=10) as store:
            url = await store.put(b"0123456789", "png", BASE_URL)
            with pytest.raises(StorageFullError):
                await store.put(b"0123456789a", "png", BASE_URL)
            assert await holds(store, url)
            assert bytes_in(tmp_path) == 10

    asyncio.run(check())


def test_hundreds_at_once_stay_below_the_limit_and_none_is_lost(tmp_path, monkeypatch):
    limit, sizes = 20_000, [200 + 7 * number for number in range(300)]
    seen = []
    fsync = os.fsync

    def look(descriptor):
        seen.append(bytes_in(tmp_path))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", look)

    async def check():
        async with local_store(tmp_path, max_bytes=limit) as store:
            data = [os.urandom(size) for size in sizes]
            urls = await asyncio.gather(*[store.put(each, "png", BASE_URL) for each in data])
            assert len(set(urls)) == len(seen) == 300
            assert limit - max(sizes) < max(seen) <= limit
            there = [await holds(store, url) for url in urls]
            # Only the oldest had to go, and none more than had to.
            kept = there.index(True)
            assert all(there[kept:])
            assert sum(sizes[kept:]) == store.num_bytes == bytes_in(tmp_path)
            assert sum(sizes[kept - 1 :]) > limit
            for url, each in list(zip(urls, data, strict=True))[kept:]:
                assert await read(store, url) == each

    asyncio.run(check())


def test_a_partial_file_has_no_url(tmp_path, monkeypatch):
    names = []
    fsync = os.fsync

    def look(descriptor):
        names.extend(file.name for file in tmp_path.iterdir())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", look)

    async def check():
        async with local_store(tmp_path) as store:
            name, expires, _ = parts(await store.put(b"x", "png", BASE_URL))
        assert names == [f"{expires}-{name}.partial"]
        assert [file.name for file in tmp_path.iterdir()] == [f"{expires}-{name}"]

    asyncio.run(check())


def test_a_client_that_hangs_up_leaves_nothing_uncounted(tmp_path, monkeypatch):
    disk = StuckDisk()
    monkeypatch.setattr(os, "fsync", disk.fsync)

    async def check():
        async with local_store(tmp_path) as store:
            puts = [asyncio.create_task(store.put(b"x" * 100, "png", BASE_URL)) for _ in range(3)]
            await until(lambda: bytes_in(tmp_path) == 100)
            for put in puts:
                put.cancel()
            disk.let_go()
            await asyncio.gather(*puts, return_exceptions=True)
            assert all(put.cancelled() for put in puts)
            url = await store.put(b"y", "png", BASE_URL)
            assert await holds(store, url)
            assert store.num_bytes == bytes_in(tmp_path)
            assert not list(tmp_path.glob("*.partial"))

    asyncio.run(check())


def test_a_request_whose_second_image_fails_leaves_no_first(tmp_path):
    async def check():
        async with local_store(tmp_path, max_bytes=100) as store:
            kept = await store.put(b"x" * 10, "png", BASE_URL)
            with pytest.raises(ImagesTooLargeError):
                await put_all(store, [b"a" * 20, b"b" * 101, b"c" * 20], "png", BASE_URL)
            await until(lambda: bytes_in(tmp_path) == 10)
            assert await holds(store, kept)
            urls = await put_all(store, [b"a", b"b"], "webp", BASE_URL)
            assert [await read(store, url) for url in urls] == [b"a", b"b"]
        assert store.num_bytes == bytes_in(tmp_path) == 12

    asyncio.run(check())


def test_images_of_one_request_never_push_one_another_out(tmp_path):
    async def check():
        async with local_store(tmp_path, max_bytes=100) as store:
            kept = await store.put(b"x" * 10, "png", BASE_URL)
            with pytest.raises(ImagesTooLargeError):
                await put_all(store, [b"a" * 40, b"b" * 40, b"c" * 40], "png", BASE_URL)
            assert await holds(store, kept)
            urls = await put_all(store, [b"a" * 50, b"b" * 50], "png", BASE_URL)
            assert [len(await read(store, url)) for url in urls] == [50, 50]

    asyncio.run(check())


def test_a_request_that_is_cancelled_among_its_images_leaves_none(tmp_path, monkeypatch):
    disk = StuckDisk()

    async def check():
        async with local_store(tmp_path) as store:
            done = await store.put(b"x" * 10, "png", BASE_URL)
            monkeypatch.setattr(os, "fsync", disk.fsync)
            putting = asyncio.create_task(put_all(store, [b"y" * 100] * 3, "png", BASE_URL))
            await until(lambda: bytes_in(tmp_path) == 110)
            putting.cancel()
            await asyncio.gather(putting, return_exceptions=True)
            assert putting.cancelled()
            disk.let_go()
            await until(lambda: bytes_in(tmp_path) == 10)
            assert await holds(store, done)
        assert store.num_bytes == 10

    asyncio.run(check())


def test_what_is_discarded_and_cannot_be_removed_is_told_and_tried_again(tmp_path, caplog):
    clock = Clock()

    async def check():
        async with local_store(tmp_path, clock=clock) as store:
            url = await store.put(b"0123456789", "png", BASE_URL)
            file = file_of(tmp_path, url)
            file.unlink()
            file.mkdir()  # which unlink refuses
            store.discard(url)
            await until(lambda: "could not be removed" in caplog.text)
            assert len(caplog.records) == 1
            assert store.num_bytes == 10
            file.rmdir()
            file.touch()
            clock.now += 1000
            other = await store.put(b"x", "png", BASE_URL)
            assert not file.exists()
            assert await holds(store, other)
            assert store.num_bytes == 1

    asyncio.run(check())


def test_a_slow_disk_does_not_block_the_event_loop(tmp_path, monkeypatch):
    disk = StuckDisk()
    monkeypatch.setattr(os, "fsync", disk.fsync)

    async def check():
        async with local_store(tmp_path) as store:
            put = asyncio.create_task(store.put(b"x", "png", BASE_URL))
            await until(lambda: disk.num_stuck)
            disk.let_go()  # by the loop, which goes on
            assert await put

    asyncio.run(check())


def test_a_file_that_cannot_be_removed_is_still_counted(tmp_path, caplog):
    async def check():
        async with local_store(tmp_path, max_bytes=30) as store:
            first = await store.put(b"0123456789", "png", BASE_URL)
            second = await store.put(b"0123456789", "png", BASE_URL)
            file = file_of(tmp_path, first)
            file.unlink()
            file.mkdir()  # which unlink refuses
            last = await store.put(b"0123456789abcdef", "png", BASE_URL)
            assert "could not be removed" in caplog.text
            assert store.num_bytes == 26
            assert not await holds(store, second)
            assert await holds(store, last)
            with pytest.raises(StorageFullError):
                await store.put(b"x" * 25, "png", BASE_URL)

    asyncio.run(check())


def test_a_link_in_the_folder_leads_nowhere(tmp_path):
    outside = tmp_path / "secret.png"
    outside.write_bytes(b"secret")

    async def check():
        async with local_store(tmp_path / "images") as store:
            url = await store.put(b"x", "png", BASE_URL)
            file = file_of(tmp_path / "images", url)
            file.unlink()
            file.symlink_to(outside)
            with pytest.raises(ExpiredFileError):
                await store.get(*parts(url))

    asyncio.run(check())
    assert outside.read_bytes() == b"secret"


def test_a_folder_that_went_away_is_an_error_without_its_path(tmp_path):
    async def check():
        folder = tmp_path / "images"
        async with local_store(folder) as store:
            url = await store.put(b"x", "png", BASE_URL)
            folder.rename(tmp_path / "elsewhere")
            with pytest.raises(StorageError) as raised:
                await store.put(b"x", "png", BASE_URL)
            assert not isinstance(raised.value, StorageFullError)
            assert str(tmp_path) not in str(raised.value)
            assert not await holds(store, url)
            (tmp_path / "elsewhere").rename(folder)
            assert await holds(store, url)
            assert await holds(store, await store.put(b"y", "png", BASE_URL))

    asyncio.run(check())
