"""The order of calls in which a CUDA graph is captured, with a stand-in for torch's CUDA."""

import contextlib
import gc
from collections import Counter
from itertools import count

import pytest
import torch

from krea2_srt.runner.graphs import CudaCapture


class FakeCuda:
    """Notes what is called, and keeps to the rules of torch's allocator and of its graphs.

    A pool is allocated from while it is in ``recording``, and there as long as someone holds it. A
    capture that CUDA has invalidated ends with an error, and torch then leaves the pool recording.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.holders: Counter[int] = Counter()
        self.recording: set[int] = set()
        self.numbers = count()
        self.capturing = self.invalid = self.fails_to_instantiate = False
        fake = self

        class Graph:
            def __init__(self) -> None:
                self.pool: int | None = None
                self.ended = False

            def capture_begin(self, pool, capture_error_mode):
                # torch asserts this of a pool that it has seen before.
                assert pool not in fake.holders or fake.holders[pool] > 0
                assert capture_error_mode == "thread_local"
                assert not gc.isenabled()
                fake.begin(0, pool)
                self.pool = pool
                fake.capturing, fake.invalid = True, False
                fake.calls.append("begin")

            def capture_end(self):
                fake.calls.append("end")
                fake.capturing = False
                if fake.invalid:
                    raise RuntimeError("CUDA error: operation failed due to a previous error")
                fake.end(0, self.pool)
                self.ended = True
                if fake.fails_to_instantiate:
                    raise torch.OutOfMemoryError("CUDA out of memory")

            def replay(self):
                fake.calls.append("replay")

            def __del__(self) -> None:
                if self.ended:
                    fake.release(0, self.pool)

        class Stream:
            def __init__(self, device, priority=0) -> None:
                self.priority = priority
                fake.streams.append(self)

            def wait_stream(self, other) -> None:
                fake.calls.append("wait")

            def synchronize(self) -> None:
                fake.calls.append("synchronize")

        self.streams: list = []
        self.CUDAGraph, self.Stream = Graph, Stream

    def graph_pool_handle(self) -> int:
        return next(self.numbers)

    def current_stream(self, device):
        return None

    def stream(self, stream):
        return contextlib.nullcontext()

    def empty_cache(self) -> None:
        # The allocator gives nothing back while any pool is allocated from.
        assert not self.recording
        self.calls.append("empty_cache")

    def begin(self, device: int, pool: int) -> None:
        if pool in self.recording:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.recording.add(pool)
        self.holders[pool] += 1

    def end(self, device: int, pool: int) -> None:
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)

    def release(self, device: int, pool: int) -> None:
        assert self.holders[pool] > 0
        self.holders[pool] -= 1

    def read_on_the_host(self) -> None:
        """What may not be done while a stream is captured, as ``tensor.item()``."""
        if self.capturing:
            self.invalid = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def invalidate(self) -> None:
        """What spoils a capture without an error of its own, such as another thread's mistake."""
        self.invalid = self.capturing


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    for name in ("CUDAGraph", "Stream", "graph_pool_handle", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(torch.cuda, "empty_cache", fake.empty_cache)
    below = "_cuda_beginAllocateCurrentThreadToPool", "_cuda_endAllocateToPool", "_cuda_releasePool"
    for name, function in zip(below, (fake.begin, fake.end, fake.release), strict=True):
        monkeypatch.setattr(torch._C, name, function)
    return fake


@pytest.fixture
def capture(cuda):
    return CudaCapture(torch.device("cuda:0"))


def test_a_function_runs_once_before_it_is_captured(cuda, capture):
    replay = capture(lambda: cuda.calls.append("work"))
    assert cuda.calls == ["wait", "work", "synchronize", "begin", "work", "end"]
    replay()
    assert cuda.calls[-1] == "replay"
    assert gc.isenabled()


def test_it_allocates_from_the_pool_both_times(cuda, capture):
    seen = []
    kept = capture(lambda: seen.append(set(cuda.recording)))
    assert seen == [{0}, {0}]
    assert not cuda.recording
    del kept


def test_the_stream_has_the_priority_that_is_asked_for(cuda):
    CudaCapture(torch.device("cuda:0"), priority=-1)
    assert cuda.streams[-1].priority == -1


def test_graphs_share_a_pool_as_long_as_one_holds_it(cuda, capture):
    kept = [capture(lambda: None) for _ in range(3)]
    assert cuda.holders == {0: 3}
    kept.clear()
    gc.collect()
    assert cuda.holders == {0: 0}
    again = capture(lambda: None)
    assert cuda.holders == {0: 0, 1: 1}
    del again


def test_two_captures_have_a_pool_each(cuda, capture):
    kept = [capture(lambda: None), CudaCapture(torch.device("cuda:0"))(lambda: None)]
    assert cuda.holders == {0: 1, 1: 1}
    del kept


@pytest.mark.parametrize(
    ("spoil", "message"),
    [("read_on_the_host", "not permitted"), ("invalidate", "due to a previous error")],
)
def test_a_capture_that_cuda_invalidates_is_survived(cuda, capture, spoil, message):
    before = capture(lambda: None)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            capture(getattr(cuda, spoil))
        assert cuda.calls[-1] == "end"
        assert gc.isenabled()
        assert not cuda.recording, "or the allocator could never give memory back again"
    gc.collect()
    after = capture(lambda: None)
    before()
    after()
    # The first graph's pool was the first spoilt one's; no one holds the second.
    assert cuda.holders == {0: 1, 1: 0, 2: 1}


def test_a_pool_that_no_graph_holds_is_not_taken_again(cuda, capture):
    kept = capture(lambda: None)
    with pytest.raises(RuntimeError):
        capture(cuda.invalidate)

    def fails():
        raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own"):
        capture(fails)  # in a new pool, which nobody holds then
    again = capture(lambda: None)
    assert cuda.holders == {0: 1, 1: 0, 2: 1}
    del kept, again


def test_what_fails_before_it_is_captured_spoils_no_pool(cuda, capture):
    kept = capture(lambda: None)

    def fails():
        raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own"):
        capture(fails)
    assert cuda.calls[-1] == "wait"
    assert not cuda.recording
    again = capture(lambda: None)
    assert cuda.holders == {0: 2}
    del kept, again


def test_an_interrupt_ends_the_capture(cuda, capture):
    def interrupted():
        if cuda.capturing:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(interrupted)
    assert not cuda.capturing
    assert not cuda.recording


def test_out_of_memory_it_is_tried_again_with_what_the_allocator_gives_back(cuda, capture):
    def fails_at_first():
        if "empty_cache" not in cuda.calls:
            raise torch.OutOfMemoryError("CUDA out of memory")

    kept = capture(fails_at_first)
    assert cuda.calls.count("empty_cache") == 1
    del kept

    def fails():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        capture(fails)
    assert cuda.calls.count("empty_cache") == 2
    assert not cuda.recording


def test_a_graph_that_cannot_be_made_of_a_capture_lets_go_of_the_pool(cuda, capture):
    kept = capture(lambda: None)
    cuda.fails_to_instantiate = True
    with pytest.raises(torch.OutOfMemoryError):
        capture(lambda: None)
    cuda.fails_to_instantiate = False
    gc.collect()
    assert cuda.holders == {0: 1}
    again = capture(lambda: None)
    assert cuda.holders == {0: 2}
    del kept, again
