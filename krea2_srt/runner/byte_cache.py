"""A cache bounded in bytes, least recently used out first."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar


class HasBytes(Protocol):
    @property
    def nbytes(self) -> int: ...


K = TypeVar("K", bound=Hashable)
V = TypeVar("V", bound=HasBytes)


class ByteCache(Generic[K, V]):
    """Remember values that say how many bytes they hold (tensors, for example).

    Args:
        max_bytes: of all values together; 0 remembers nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.hits = 0
        self.misses = 0
        self._values: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K) -> V | None:
        """The value of a key, or None; counts a hit or a miss."""
        value = self._values.get(key)
        if value is None:
            self.misses += 1
            return None
        self.hits += 1
        self._values.move_to_end(key)
        return value

    def get_or(self, key: K, make: Callable[[], V]) -> V:
        """The value of a key; made and remembered where it is not known."""
        value = self.get(key)
        if value is None:
            value = make()
            self.put(key, value)
        return value

    def clear(self) -> None:
        """Forget all values."""
        self._values.clear()
        self.num_bytes = 0

    def put(self, key: K, value: V) -> None:
        """Remember a value that owns its memory; one larger than the whole cache is not kept."""
        self._forget(key)
        if value.nbytes > self.max_bytes:
            return
        self._values[key] = value
        self.num_bytes += value.nbytes
        while self.num_bytes > self.max_bytes:
            self._forget(next(iter(self._values)))

    def _forget(self, key: K) -> None:
        value = self._values.pop(key, None)
        if value is not None:
            self.num_bytes -= value.nbytes
