"""A disk that fills up: the client is told, nothing partial stays, and the store goes on."""

import asyncio
import errno
import os
import subprocess
import sys
import textwrap

import pytest

from krea2_server.storage.store import StorageError, StorageFullError
from tests.unit.server.storage.stores import BASE_URL, bytes_in, local_store, read


def test_a_full_disk_is_told_and_overcome(small_disk, caplog):
    async def check():
        async with local_store(small_disk / "images", max_bytes=10**9) as store:
            small = await store.put(os.urandom(300_000), "png", BASE_URL)
            for _ in range(3):
                with pytest.raises(StorageFullError) as raised:
                    await store.put(os.urandom(900_000), "png", BASE_URL)
                assert str(small_disk) not in str(raised.value)
            assert not list((small_disk / "images").glob("*.partial"))
            assert store.num_bytes == bytes_in(small_disk / "images") == 300_000
            other = await store.put(os.urandom(600_000), "png", BASE_URL)
            for url in (small, other):
                assert await read(store, url)
            results = await asyncio.gather(
                *[store.put(os.urandom(50_000), "png", BASE_URL) for _ in range(20)],
                return_exceptions=True,
            )
            stored = [result for result in results if isinstance(result, str)]
            failed = [result for result in results if not isinstance(result, str)]
            assert stored
            assert failed
            assert all(isinstance(result, StorageFullError) for result in failed)
            for url in stored:
                assert len(await read(store, url)) == 50_000
            assert store.num_bytes == bytes_in(small_disk / "images")

    asyncio.run(check())
    assert "No space left" in caplog.text


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, StorageFullError),
        (errno.EDQUOT, StorageFullError),
        (errno.EIO, StorageError),
        (errno.EROFS, StorageError),
    ],
    ids=errno.errorcode.get,
)
def test_an_error_at_the_last_moment_leaves_nothing(tmp_path, monkeypatch, number, kind):
    fsync = os.fsync
    failing = True

    def fail(descriptor):
        if failing:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)

    async def check():
        nonlocal failing
        async with local_store(tmp_path) as store:
            puts = [store.put(b"x" * 100, "png", BASE_URL) for _ in range(5)]
            results = await asyncio.gather(*puts, return_exceptions=True)
            assert [type(result) for result in results] == [kind] * 5
            assert not list(tmp_path.iterdir())
            assert store.num_bytes == 0
            failing = False
            url = await store.put(b"x" * 100, "png", BASE_URL)
            assert await read(store, url) == b"x" * 100

    asyncio.run(check())


def test_a_file_larger_than_the_system_allows_is_told(tmp_path):
    # In a process of its own: the limit is one of processes.
    program = """
        import asyncio, resource, sys
        from pathlib import Path
        from krea2_server.storage.store import StorageFullError
        from tests.unit.server.storage.stores import BASE_URL, bytes_in, local_store, read

        async def check(folder):
            async with local_store(folder) as store:
                try:
                    await store.put(b"x" * 50_000, "png", BASE_URL)
                except StorageFullError:
                    print("full", bytes_in(folder), store.num_bytes)
                url = await store.put(b"x" * 5_000, "png", BASE_URL)
                print("stored", len(await read(store, url)))

        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        asyncio.run(check(Path(sys.argv[1])))
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == ["full 0 0", "stored 5000"], done.stderr
