"""The adapters that are on the device, least recently used out first."""

from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from krea2_srt.errors import AdapterError
from krea2_srt.lora.adapter import Adapter
from krea2_srt.lora.files import Stamp, stamp_of
from krea2_srt.lora.placed import AdapterSet, PlacedAdapter
from krea2_srt.lora.reader import read_adapter
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.request import AdapterUse

MAX_BYTES = 4 << 30
"""On the device: 18 adapters of rank 32 for the released model's matrices, in bfloat16."""


class AdapterPool:
    """Adapters by what is in them.

    One that is dropped lives on as long as a sequence has it, and is read again for the next one.

    Args:
        dit: the model that they are for.
        max_bytes: of all together; the one that was added last stays whatever it takes.
    """

    def __init__(self, dit: Krea2DiT, max_bytes: int = MAX_BYTES) -> None:
        self._dit = dit
        self._max_bytes = max_bytes
        self._placed: OrderedDict[str, PlacedAdapter] = OrderedDict()
        # What was read from each file, and the files that each adapter was read from.
        self._read: dict[Path, tuple[Stamp, str]] = {}
        self._files: dict[str, list[Path]] = {}

    def __len__(self) -> int:
        return len(self._placed)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(adapter.nbytes for adapter in self._placed.values())

    def __contains__(self, digest: str) -> bool:
        return digest in self._placed

    def load(self, path: Path) -> PlacedAdapter:
        """The adapter of a file or folder, which is read where it is new or has changed.

        Raises:
            AdapterError: see `krea2_srt.lora.reader.read_adapter`.
        """
        path = path.absolute()
        stamp = stamp_of(path)  # before it is read: one that is replaced meanwhile is read again
        known = self._read.get(path)
        if known is not None and known[0] == stamp and known[1] in self._placed:
            self._placed.move_to_end(known[1])
            return self._placed[known[1]]
        found = self.add(read_adapter(path, self._dit.config))
        files = self._files.setdefault(found.digest, [])
        if path not in files:
            files.append(path)
        if stamp is not None:
            self._read[path] = (stamp, found.digest)
        return found

    def add(self, adapter: Adapter) -> PlacedAdapter:
        """Put an adapter on the device, if it is not there.

        Raises:
            AdapterError: it is another model's.
        """
        if adapter.digest not in self._placed:
            self._placed[adapter.digest] = PlacedAdapter.beside(self._dit, adapter)
        self._placed.move_to_end(adapter.digest)
        while self.nbytes > self._max_bytes and len(self) > 1:
            self._placed.popitem(last=False)
        return self._placed[adapter.digest]

    def find(self, uses: Iterable[AdapterUse]) -> AdapterSet:
        """What an image asks for.

        Raises:
            AdapterError: one was never loaded, or made room and its file is another now.
        """
        return AdapterSet.of(*[(self._found(use), use.scale) for use in uses])

    def _found(self, use: AdapterUse) -> PlacedAdapter:
        if use.digest in self._placed:
            self._placed.move_to_end(use.digest)
            return self._placed[use.digest]
        self.check([use])
        for path in list(self._files.get(use.digest, ())):
            with suppress(AdapterError):
                again = self.load(path)
                if again.digest == use.digest:
                    return again
        raise AdapterError(f"adapter {use.name}: its file is gone or another since it was loaded")

    def check(self, uses: Iterable[AdapterUse]) -> None:
        """Check that adapters have been loaded; one may have made room since.

        Raises:
            AdapterError: one never was.
        """
        for use in uses:
            if use.digest not in self._placed and use.digest not in self._files:
                raise AdapterError(f"adapter {use.name}: it is not loaded")

    def release(self) -> None:
        """Drop those that can be read again."""
        for digest in self._files:
            self._placed.pop(digest, None)
