"""The start of a local store: what an earlier run has left, and what must be in order."""

import asyncio
import os

import pytest

from krea2_server.storage.local import LocalStore, UnknownFileError
from krea2_server.storage.store import StorageError
from tests.unit.server.storage.stores import (
    BASE_URL,
    KEY,
    PATH,
    Clock,
    bytes_in,
    holds,
    local_store,
    parts,
    read,
)


def test_urls_outlive_a_restart_until_they_expire(tmp_path):
    async def check():
        clock = Clock()
        async with local_store(tmp_path, clock=clock) as store:
            early = await store.put(b"early", "png", BASE_URL)
            clock.now += 50
            late = await store.put(b"late", "webp", BASE_URL)
        # A shorter expiry is for new images: these were promised more.
        async with local_store(tmp_path, clock=clock, expiry_s=1) as store:
            assert await read(store, early) == b"early"
            assert await read(store, late) == b"late"
            assert store.num_bytes == len(b"early" + b"late")
        clock.now += 50
        async with local_store(tmp_path, clock=clock) as store:
            assert not await holds(store, early)
            assert await holds(store, late)
            assert store.num_bytes == bytes_in(tmp_path) == len(b"late")
        async with local_store(tmp_path, clock=clock, signing_key=KEY[::-1]) as store:
            with pytest.raises(UnknownFileError):
                await store.get(*parts(late))

    asyncio.run(check())


def test_a_start_removes_what_is_partial_or_too_much_and_nothing_of_others(tmp_path):
    async def check():
        async with local_store(tmp_path) as store:
            urls = [await store.put(b"0123456789", "png", BASE_URL) for _ in range(3)]
        stored = next(file for file in tmp_path.iterdir() if parts(urls[0])[0] in file.name)
        partial = stored.with_name(stored.name + ".partial")
        partial.write_bytes(b"01234")
        others = [tmp_path / name for name in ("notes.txt", "x.partial", f"{'0' * 32}.png")]
        for file in others:
            file.write_bytes(b"not ours")
        async with local_store(tmp_path, max_bytes=25) as store:
            assert [await holds(store, url) for url in urls] == [False, True, True]
            assert store.num_bytes == 20
            assert not partial.exists()
            assert all(file.read_bytes() == b"not ours" for file in others)

    asyncio.run(check())


@pytest.mark.parametrize("where", ["/proc/images", "/dev/null", "/dev/null/images"])
def test_a_start_without_a_usable_folder_names_the_setting(where, tmp_path):
    store = LocalStore(tmp_path / where, signing_key=KEY, expiry_s=1, max_bytes=1, path=PATH)
    with pytest.raises(StorageError, match=rf"^storage: {where}: \w+"):
        asyncio.run(store.start())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_start_without_the_right_to_write_names_the_setting(tmp_path):
    tmp_path.chmod(0o500)
    store = LocalStore(tmp_path, signing_key=KEY, expiry_s=1, max_bytes=1, path=PATH)
    with pytest.raises(StorageError, match=r"^storage: .*Permission denied"):
        asyncio.run(store.start())


def test_a_short_key_is_refused(tmp_path):
    store = LocalStore(tmp_path, signing_key=b"x" * 15, expiry_s=1, max_bytes=1, path=PATH)
    with pytest.raises(StorageError, match=r"^storage_key: "):
        asyncio.run(store.start())
