import torch
from hypothesis import given
from hypothesis import strategies as st

from krea2_srt.runner.byte_cache import ByteCache


class Value:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


@given(
    st.integers(0, 50),
    st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 60)), max_size=60),
)
def test_it_never_holds_more_than_its_bound(max_bytes, operations):
    cache: ByteCache[int, Value] = ByteCache(max_bytes)
    latest: dict[int, Value] = {}
    for put, key, size in operations:
        if put:
            latest[key] = Value(size)
            cache.put(key, latest[key])
            assert (cache.get(key) is latest[key]) == (size <= max_bytes)
        else:
            assert cache.get(key) in (None, latest.get(key))
        held = [v for k in range(10) if (v := cache._values.get(k)) is not None]
        assert cache.num_bytes == sum(v.nbytes for v in held) <= max_bytes
        assert len(cache) == len(held)


def test_the_least_recently_used_goes_first():
    cache: ByteCache[str, torch.Tensor] = ByteCache(3 * 40)
    for key in "abc":
        cache.put(key, torch.zeros(10))
    assert cache.get("a") is not None
    cache.put("d", torch.zeros(10))
    assert cache.get("b") is None
    assert all(cache.get(key) is not None for key in "acd")
    assert (cache.hits, cache.misses) == (4, 1)
