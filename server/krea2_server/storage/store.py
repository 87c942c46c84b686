"""What a store of images does, and how it fails."""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Protocol


class StorageError(Exception):
    """An image could not be stored; fit for a client: without paths and secrets."""


class StorageFullError(StorageError):
    """There is no room for it."""


class ImagesTooLargeError(StorageFullError):
    """A request's images are larger than all of the store may be."""


class ImageStore(Protocol):
    """A place for images, each behind a URL."""

    async def start(self) -> None:
        """Get ready.

        Raises:
            StorageError: nothing can be stored there; names the setting, for the operator.
        """

    def check_room(self, num_bytes: int) -> None:
        """Check that images of one request can be there together.

        Raises:
            ImagesTooLargeError: however empty it was, they could not.
        """

    async def put(self, data: bytes, extension: str, base_url: str) -> str:
        """Store an image; returns its URL. One that fails or is cancelled leaves nothing behind.

        Args:
            data: the image's file.
            extension: ``png``, ``jpeg`` or ``webp``.
            base_url: how the client reaches this server, without a slash at its end.

        Raises:
            StorageError: it could not be stored.
            ValueError: another extension.
        """

    def discard(self, url: str) -> None:
        """Remove an image whose URL nobody was told, while the caller goes on.

        Where that fails, a line is logged: it then goes when all go that are as old.
        """

    async def close(self) -> None:
        """End what was started, and what is being removed."""


async def put_all(
    store: ImageStore, images: Sequence[bytes], extension: str, base_url: str
) -> tuple[str, ...]:
    """Store the images of a request: all of them, or none if one fails or nobody waits any more.

    Raises:
        StorageError: the first failure.
    """
    store.check_room(sum(map(len, images)))
    puts = [asyncio.create_task(store.put(data, extension, base_url)) for data in images]
    try:
        return tuple(await asyncio.gather(*puts))
    except BaseException:
        for put in puts:
            if put.done():
                _discard(store, put)
            elif put.cancel():
                put.add_done_callback(partial(_discard, store))
        # No longer than a cancelled task takes to end: what is to be removed is known then.
        await asyncio.wait(puts)
        raise


def _discard(store: ImageStore, put: asyncio.Task[str]) -> None:
    if not put.cancelled() and put.exception() is None:
        store.discard(put.result())
