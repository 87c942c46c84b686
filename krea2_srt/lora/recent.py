"""Adapters in one memory, least recently used out first."""

from collections import OrderedDict
from weakref import WeakValueDictionary

from krea2_srt.lora.placed import PlacedAdapter


class RecentAdapters:
    """Keeps adapters, up to so many bytes. One that is dropped while others have it is still
    there, and counts, until they let go of it.

    Args:
        max_bytes: of all together; the one that was added last stays whatever it takes.

    Attributes:
        evictions: how many have made room.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.evictions = 0
        self._kept: OrderedDict[str, PlacedAdapter] = OrderedDict()
        self._alive: WeakValueDictionary[str, PlacedAdapter] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, digest: str) -> bool:
        return digest in self._alive

    @property
    def digests(self) -> list[str]:
        """Those that are kept, the least recently used first."""
        return list(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of all that are there."""
        return sum(adapter.nbytes for adapter in self._alive.values())

    def find(self, digest: str) -> PlacedAdapter | None:
        """An adapter, which is thereby used."""
        found = self._alive.get(digest)
        if found is not None:
            self._kept[digest] = found
            self._kept.move_to_end(digest)
        return found

    def add(self, adapter: PlacedAdapter) -> None:
        """Keep one, if none of its digest is there, and let others make room."""
        if self.find(adapter.digest) is None:
            self.make_room(adapter.nbytes)
            self._alive[adapter.digest] = self._kept[adapter.digest] = adapter

    def make_room(self, nbytes: int) -> None:
        """Drop what nobody has, as long as so many bytes do not fit."""
        for digest in self.digests:
            if self.nbytes + nbytes <= self.max_bytes:
                return
            self.drop(digest)
            in_use = self._alive.get(digest)
            if in_use is None:
                self.evictions += 1
            else:
                self._kept[digest] = in_use  # dropping it gave no memory back

    def drop(self, digest: str) -> None:
        """Keep one no more."""
        self._kept.pop(digest, None)
