"""Where adapters are: on the device, in host memory beside it, or in their files only."""

from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from krea2_srt.errors import AdapterError
from krea2_srt.lora.adapter import Adapter
from krea2_srt.lora.files import Stamp, stamp_of
from krea2_srt.lora.placed import AdapterSet, PlacedAdapter
from krea2_srt.lora.reader import read_adapter
from krea2_srt.lora.recent import RecentAdapters
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.request import AdapterUse

MAX_BYTES = 2 << 30
"""On the device: nine adapters of rank 32 for the released model's matrices, in bfloat16."""

MAX_HOST_BYTES = 4 << 30
"""In host memory, pinned where there is a GPU."""


class AdapterPool:
    """Adapters by what is in them.

    One that is dropped lives on as long as a sequence has it; from the device it goes to where it
    was copied from, and from the host to its file. Factors of blocks that are on the host stay
    there, in pinned memory, and take no room on the device.

    Args:
        dit: the model that they are for.
        max_bytes: of all on the device; the one that was asked for last stays whatever it takes.
        max_host_bytes: of all on the host.

    Attributes:
        on_device, on_host: those that are there.
        hits: how often one was on the device that was asked for.
        uploads: how often one was copied there.
        reads: how often one was read from its file.
    """

    def __init__(
        self, dit: Krea2DiT, max_bytes: int = MAX_BYTES, max_host_bytes: int = MAX_HOST_BYTES
    ) -> None:
        self._dit = dit
        self._device = dit.img_in.weight.device
        self._hosted = {linear for b in dit.host_blocks.values() for linear in b.linears}
        self.on_device = RecentAdapters(max_bytes)
        self.on_host = RecentAdapters(max_host_bytes)
        self.hits = self.uploads = self.reads = 0
        self._sizes: dict[str, int] = {}
        # What was read from each file, and the files that each adapter was read from.
        self._read: dict[Path, tuple[Stamp, str]] = {}
        self._files: dict[str, list[Path]] = {}

    def load(self, path: Path) -> PlacedAdapter:
        """The adapter of a file or folder, on the device; read where it is new or has changed.

        Raises:
            AdapterError: see `krea2_srt.lora.reader.read_adapter`.
        """
        path = path.absolute()
        stamp = stamp_of(path)  # before it is read: one that is replaced meanwhile is read again
        known = self._read.get(path)
        if known is None or known[0] != stamp or not self._is_there(known[1]):
            adapter = read_adapter(path, self._dit.config)
            self.put(PlacedAdapter.on_host(self._dit, adapter), path)
            if stamp is not None:
                self._read[path] = (stamp, adapter.digest)
            return self._placed(adapter.digest)
        return self._placed(known[1])

    def add(self, adapter: Adapter) -> PlacedAdapter:
        """Put an adapter on the device, if it is not there.

        Raises:
            AdapterError: it is another model's.
        """
        if not self._is_there(adapter.digest):
            self._keep(PlacedAdapter.on_host(self._dit, adapter))
        return self._placed(adapter.digest)

    def put(self, adapter: PlacedAdapter, path: Path) -> PlacedAdapter:
        """Keep an adapter on the host that was read from a file.

        Args:
            adapter: from `PlacedAdapter.on_host`.
            path: where it can be read again.

        Returns:
            The one that is kept: another, where an equal one was there.
        """
        kept = self.on_host.find(adapter.digest)
        if kept is None:
            self.reads += 1
            self._keep(adapter)
            kept = adapter
        files = self._files.setdefault(adapter.digest, [])
        if path not in files:
            files.append(path)
        return kept

    def find(self, uses: Iterable[AdapterUse]) -> AdapterSet:
        """What an image asks for, on the device.

        Raises:
            AdapterError: one was never loaded, or made room and its file is another now.
        """
        return AdapterSet.of(*[(self._found(use), use.scale) for use in uses])

    def where(self, digest: str) -> str:
        """``device``, ``host`` or ``disk``."""
        if digest in self.on_device:
            return "device"
        return "host" if digest in self.on_host else "disk"

    def drop(self, digest: str) -> None:
        """Keep one no more; who has it has it."""
        self.on_device.drop(digest)
        self.on_host.drop(digest)

    def host_copy(self, digest: str) -> PlacedAdapter | None:
        """What the device's is copied from; None where it would have to be read."""
        return self.on_host.find(digest)

    def check(self, uses: Iterable[AdapterUse]) -> None:
        """Check that adapters have been loaded; one may have made room since.

        Raises:
            AdapterError: one never was.
        """
        for use in uses:
            if not self._is_there(use.digest) and use.digest not in self._files:
                raise AdapterError(f"adapter {use.name}: it is not loaded")

    def fit(self, digests: Collection[str]) -> bool:
        """Whether the device has room for all of these at a time. What is not known takes none."""
        return sum(self._sizes.get(d, 0) for d in digests) <= self.on_device.max_bytes

    def statistics(self) -> dict[str, int]:
        """Counters of what is where, and of how it came there."""
        return {
            "adapters_on_device": len(self.on_device),
            "adapters_on_host": len(self.on_host),
            "adapter_device_bytes": self.on_device.nbytes,
            "adapter_host_bytes": self.on_host.nbytes,
            "adapter_hits": self.hits,
            "adapter_uploads": self.uploads,
            "adapter_reads": self.reads,
            "adapter_evictions": self.on_device.evictions,
        }

    def release(self) -> None:
        """Drop those that can be made anew from the device."""
        for digest in self.on_device.digests:
            if self.on_host.find(digest) is not None or digest in self._files:
                self.on_device.drop(digest)

    def _is_there(self, digest: str) -> bool:
        return digest in self.on_device or digest in self.on_host

    def _keep(self, adapter: PlacedAdapter) -> None:
        self._sizes[adapter.digest] = adapter.nbytes_without(self._hosted)
        self._make_room_on_host(adapter.nbytes)
        self.on_host.add(adapter)

    def _make_room_on_host(self, nbytes: int) -> None:
        """Also of those on the device that have factors on the host, which take little room there:
        whatever the device has room for, they would fill the host's memory.
        """
        self.on_host.make_room(nbytes)
        for digest in self.on_device.digests if self._hosted else ():
            if self.on_host.nbytes + nbytes <= self.on_host.max_bytes:
                return
            if digest in self.on_host:
                self.on_device.drop(digest)
                self.on_host.make_room(nbytes)

    def _found(self, use: AdapterUse) -> PlacedAdapter:
        if not self._is_there(use.digest):
            self.check([use])
            self._read_again(use)
        return self._placed(use.digest)

    def _read_again(self, use: AdapterUse) -> None:
        for path in self._files[use.digest]:
            with suppress(AdapterError):
                adapter = read_adapter(path, self._dit.config)
                if adapter.digest == use.digest:
                    self.put(PlacedAdapter.on_host(self._dit, adapter), path)
                    return
        raise AdapterError(f"adapter {use.name}: its file is gone or another since it was loaded")

    def _placed(self, digest: str) -> PlacedAdapter:
        """One that is there, on the device."""
        found = self.on_device.find(digest)
        if found is not None:
            self.hits += 1
            self.on_device.make_room(0)  # others may have ended since one was added
            return found
        host = self.on_host.find(digest)
        assert host is not None
        self.on_device.make_room(host.nbytes_without(self._hosted))
        self.uploads += 1
        found = host.to(self._device, self._hosted)
        self.on_device.add(found)
        return found
