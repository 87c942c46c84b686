"""What a store of images does, and how it fails."""

from typing import Protocol


class StorageError(Exception):
    """An image could not be stored; fit for a client: without paths and secrets."""


class StorageFullError(StorageError):
    """There is no room for it."""


class ImageTooLargeError(StorageFullError):
    """It is larger than all of the store may be."""


class ImageStore(Protocol):
    """A place for images, each behind a URL."""

    async def start(self) -> None:
        """Get ready.

        Raises:
            StorageError: nothing can be stored there; names the setting, for the operator.
        """

    async def put(self, data: bytes, extension: str, base_url: str) -> str:
        """Store an image; returns its URL.

        Args:
            data: the image's file.
            extension: ``png``, ``jpeg`` or ``webp``.
            base_url: how the client reaches this server, without a slash at its end.

        Raises:
            StorageError: it could not be stored.
            ValueError: another extension.
        """

    async def close(self) -> None:
        """End what was started."""
