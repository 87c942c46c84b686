"""Images in object storage, behind URLs that the storage itself signs."""

import asyncio
import logging
import math
from collections.abc import Mapping
from typing import Any

from krea2_srt.image_files import MEDIA_TYPES
from server.storage.signatures import new_name
from server.storage.store import StorageError

logger = logging.getLogger(__name__)

_PROBE = ".krea2-srt-write-test"


class FsspecStore:
    """An `ImageStore` on one of fsspec's file systems that can sign URLs, such as S3.

    Old files are the storage's to remove: set a life-cycle rule on the bucket.

    Args:
        url: ``s3://bucket/prefix``.
        expiry_s: life of a URL.
        options: of the file system; see s3fs.
    """

    def __init__(self, url: str, *, expiry_s: float, options: Mapping[str, Any] = {}) -> None:
        self._url = url.rstrip("/")
        self._expiry_s = math.ceil(expiry_s)
        self._options = dict(options)
        self._files: Any = None

    async def start(self) -> None:
        await asyncio.to_thread(self._open)

    async def put(self, data: bytes, extension: str, base_url: str) -> str:
        try:
            return await asyncio.to_thread(self._put, data, extension)
        except Exception as error:
            # Whatever a back end raises; its text may hold addresses and keys.
            logger.error("an image could not be stored: %s", type(error).__name__, exc_info=True)
            raise StorageError("the image could not be stored") from None

    async def close(self) -> None:
        self._files = None

    # In threads.

    def _open(self) -> None:
        import fsspec

        try:
            self._files, path = fsspec.core.url_to_fs(self._url, **self._options)
            # Writing, not asking, is what has to be possible.
            self._files.pipe_file(f"{path}/{_PROBE}", b"")
            self._files.sign(f"{path}/{_PROBE}", expiration=self._expiry_s)
            self._files.rm_file(f"{path}/{_PROBE}")
        except NotImplementedError:
            raise StorageError(f"storage: {self._url}: has no URLs; use s3://") from None
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise StorageError(f"storage: {self._url} cannot be written to: {reason}") from None
        self._path = path

    def _put(self, data: bytes, extension: str) -> str:
        path = f"{self._path}/{new_name(extension)}"
        self._files.pipe_file(path, data, **self._headers(extension))
        return str(self._files.sign(path, expiration=self._expiry_s))

    def _headers(self, extension: str) -> dict[str, str]:
        if "s3" not in self._files.protocol:
            return {}
        return {"ContentType": MEDIA_TYPES[extension]}
