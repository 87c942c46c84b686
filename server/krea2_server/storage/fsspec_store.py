"""Images in object storage, behind URLs that the storage itself signs."""

import asyncio
import logging
import math
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from krea2_server.storage.signatures import new_name
from krea2_server.storage.store import StorageError
from krea2_srt.errors import how_to_install
from krea2_srt.images import MEDIA_TYPES

logger = logging.getLogger(__name__)

_S3 = ("s3", "s3a")
_S3_MAX_EXPIRY_S = 7 * 24 * 3600
"""AWS's longest validity of a URL, in seconds; a longer one is refused when it is used."""

_WRITE_TEST = "krea2-srt-write-test"


class FsspecStore:
    """An `ImageStore` on one of fsspec's asynchronous file systems that can sign URLs, such as S3.

    Old files are the storage's to remove: set a life-cycle rule on the bucket. A URL that was
    signed with temporary credentials ends with them, even if that is sooner.

    Args:
        url: ``s3://bucket/prefix``.
        expiry_s: life of a URL.
        options: of the file system; see s3fs.
        timeout_s: for an image to be stored, all retries included.
    """

    def __init__(
        self,
        url: str,
        *,
        expiry_s: float,
        options: Mapping[str, Any] = {},
        timeout_s: float = 60.0,
    ) -> None:
        self._scheme, _, path = url.partition("://")
        self._path = path.strip("/")
        self._expiry_s = math.ceil(expiry_s)
        self._options = dict(options)
        self._timeout_s = timeout_s
        self._files: Any = None
        self._removals: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        # Without what may stand before the bucket: credentials.
        name = f"{self._scheme}://{self._path.rpartition('@')[2]}"
        if not self._path:
            raise StorageError(f"storage: {name} names no bucket")
        if self._scheme in _S3 and self._expiry_s > _S3_MAX_EXPIRY_S:
            raise StorageError(
                f"url_expiry_s: {self._expiry_s}; S3 signs for {_S3_MAX_EXPIRY_S} at most"
            )
        try:
            async with asyncio.timeout(self._timeout_s):
                await asyncio.to_thread(self._open)
                await self._try()
        except NotImplementedError:
            raise StorageError(f"storage: {name} has no signed URLs; use s3://") from None
        except ImportError:
            extra = how_to_install("s3") if self._scheme in _S3 else "see fsspec's page"
            raise StorageError(
                f"storage: {self._scheme}:// needs a package that is not installed; {extra}"
            ) from None
        except Exception as error:
            logger.debug("storage could not be used", exc_info=True)
            reason = _reason(error)
            raise StorageError(f"storage: {name} cannot be written and read: {reason}") from None

    def check_room(self, num_bytes: int) -> None:
        """A bucket has no limit that is known here."""

    async def put(self, data: bytes, extension: str, base_url: str) -> str:
        path = f"{self._path}/{new_name(extension)}"
        headers = {"ContentType": MEDIA_TYPES[extension]} if self._scheme in _S3 else {}
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._run(self._files._pipe_file(path, data, **headers))
                return await self._sign(path)
        except asyncio.CancelledError:
            self._remove(path)
            raise
        except Exception as error:
            # It may have been stored all the same: what has failed may be the answer, or the URL.
            self._remove(path)
            # Whatever a back end raises; its text may hold addresses and keys.
            logger.error("an image could not be stored: %s", _reason(error))
            logger.debug("an image could not be stored", exc_info=True)
            raise StorageError("the image could not be stored") from None

    def discard(self, url: str) -> None:
        self._remove(f"{self._path}/{urlsplit(url).path.rpartition('/')[2]}")

    async def close(self) -> None:
        await asyncio.gather(*self._removals)
        self._files = None

    def _open(self) -> None:
        import fsspec

        known = self._scheme in fsspec.available_protocols()
        if not (known and fsspec.get_filesystem_class(self._scheme).async_impl):
            raise NotImplementedError
        options = dict(self._options)
        if self._scheme in _S3:
            # Left alone, botocore signs URLs the old way, which encrypted buckets and newer
            # regions refuse.
            config = {"signature_version": "s3v4", **options.get("config_kwargs", {})}
            options["config_kwargs"] = config
        # Not from fsspec's cache, where credentials would outlive the store.
        self._files = fsspec.filesystem(self._scheme, skip_instance_cache=True, **options)

    async def _try(self) -> None:
        """Write, sign, read and remove a file: permissions alone do not say what is possible."""
        path = f"{self._path}/{_WRITE_TEST}"
        await self._sign(path)
        await self._run(self._files._pipe_file(path, b"1"))
        await self._run(self._files._cat_file(path))
        # Who may not remove files can still store them.
        with suppress(PermissionError):
            await self._run(self._files._rm_file(path))

    def _remove(self, path: str) -> None:
        """Remove a file, if it is there, while the caller goes on."""
        removal = asyncio.create_task(self._try_to_remove(path))
        self._removals.add(removal)
        removal.add_done_callback(self._removals.discard)

    async def _try_to_remove(self, path: str) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._run(self._files._rm_file(path))
        except FileNotFoundError:
            pass
        except Exception as error:
            logger.warning("an image could not be removed: %s", _reason(error))

    async def _run(self, call: Coroutine[Any, Any, Any]) -> None:
        """Await one of the file system's coroutines, on the loop that fsspec has for them.

        A thread that waits for it would go on waiting, for minutes, when nobody does any more.
        """
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call, self._files.loop))

    async def _sign(self, path: str) -> str:
        return str(await asyncio.to_thread(self._files.sign, path, expiration=self._expiry_s))


def _reason(error: Exception) -> str:
    """What went wrong, in a word: S3's, or the error's type."""
    for known in (error, error.__cause__):
        response = getattr(known, "response", None)
        if isinstance(response, dict) and (code := response.get("Error", {}).get("Code")):
            return str(code)
    return type(error).__name__
