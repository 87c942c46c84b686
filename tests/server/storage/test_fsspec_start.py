"""What stops a store on S3 from starting; each message names the setting, and no secrets."""

import asyncio
import logging

import pytest
from moto.core import set_initial_no_auth_action_count

from krea2_server.storage.fsspec_store import FsspecStore
from krea2_server.storage.store import StorageError
from tests.server.storage.s3 import SECRET, fsspec_store, is_clean


def test_a_bucket_that_is_missing_fails_the_start(endpoint, caplog):
    async def check():
        async with fsspec_store("s3://no-such-bucket/images", endpoint):
            pass

    caplog.set_level(logging.INFO)
    expected = r"^storage: s3://no-such-bucket/images .*NoSuchBucket"
    with pytest.raises(StorageError, match=expected) as raised:
        asyncio.run(check())
    assert is_clean(str(raised.value), caplog, endpoint)


@set_initial_no_auth_action_count(0)
def test_a_key_that_is_refused_fails_the_start(endpoint, bucket):
    async def check():
        async with fsspec_store(f"s3://{bucket}", endpoint):
            pass

    with pytest.raises(StorageError, match=r"InvalidAccessKeyId") as raised:
        asyncio.run(check())
    assert "the-key" not in str(raised.value)


@pytest.mark.parametrize("scheme", ["file", "memory", "zip", "nonsense", "http"])
def test_a_scheme_that_cannot_sign_fails_the_start(tmp_path, scheme):
    store = FsspecStore(f"{scheme}://{tmp_path}/images", expiry_s=60)
    with pytest.raises(StorageError, match=rf"^storage: {scheme}://.* no signed URLs; use s3://"):
        asyncio.run(store.start())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["s3://", "s3:///"])
def test_a_url_without_a_bucket_fails_the_start(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match=r"^storage: s3:// names no bucket"):
        asyncio.run(FsspecStore(url, expiry_s=60).start())
    assert not list(tmp_path.iterdir())


def test_credentials_in_the_url_are_not_repeated():
    store = FsspecStore(f"nonsense://user:{SECRET}@bucket/images", expiry_s=60)
    with pytest.raises(StorageError) as raised:
        asyncio.run(store.start())
    assert SECRET not in str(raised.value)
    assert "bucket/images" in str(raised.value)


def test_a_life_that_s3_cannot_sign_fails_the_start(endpoint, bucket):
    async def check(expiry_s):
        async with fsspec_store(f"s3://{bucket}", endpoint, expiry_s=expiry_s):
            pass

    asyncio.run(check(7 * 24 * 3600))
    with pytest.raises(StorageError, match=r"^url_expiry_s: .*604800"):
        asyncio.run(check(7 * 24 * 3600 + 1))
