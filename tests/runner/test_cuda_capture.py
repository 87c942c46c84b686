"""The order of calls in which a CUDA graph is captured, with a stand-in for torch's CUDA."""

import contextlib
import gc
from itertools import count

import pytest
import torch

from krea2_srt.runner.graphs import CudaCapture


class FakeCuda:
    """Notes what is called, and keeps to torch's rule about pools."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.holders: dict[int, int] = {}
        self.numbers = count()
        fake = self

        class Graph:
            def __init__(self) -> None:
                self.pool: int | None = None

            def capture_begin(self, pool, capture_error_mode):
                # torch asserts this of a pool that it has seen before.
                assert pool not in fake.holders or fake.holders[pool] > 0
                assert capture_error_mode == "thread_local"
                assert not gc.isenabled()
                fake.holders[pool] = fake.holders.get(pool, 0) + 1
                self.pool = pool
                fake.calls.append("begin")

            def capture_end(self):
                fake.calls.append("end")

            def replay(self):
                fake.calls.append("replay")

            def __del__(self) -> None:
                if self.pool is not None:
                    fake.holders[self.pool] -= 1

        class Stream:
            def __init__(self, device) -> None:
                pass

            def wait_stream(self, other) -> None:
                fake.calls.append("wait")

        self.CUDAGraph, self.Stream = Graph, Stream

    def graph_pool_handle(self) -> int:
        return next(self.numbers)

    def current_stream(self, device):
        return None

    def stream(self, stream):
        return contextlib.nullcontext()

    def synchronize(self, device) -> None:
        self.calls.append("synchronize")


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    for name in ("CUDAGraph", "Stream", "graph_pool_handle", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(torch.cuda, "synchronize", fake.synchronize)
    return fake


@pytest.fixture
def capture(cuda):
    return CudaCapture(torch.device("cuda"))


def test_a_function_runs_once_before_it_is_captured(cuda, capture):
    replay = capture(lambda: cuda.calls.append("work"))
    assert cuda.calls == ["wait", "work", "synchronize", "begin", "work", "end"]
    replay()
    assert cuda.calls[-1] == "replay"
    assert gc.isenabled()


def test_graphs_share_a_pool_as_long_as_one_holds_it(cuda, capture):
    kept = [capture(lambda: None) for _ in range(3)]
    assert cuda.holders == {0: 3}
    kept.clear()
    gc.collect()
    assert cuda.holders == {0: 0}
    again = capture(lambda: None)
    assert cuda.holders == {0: 0, 1: 1}
    del again


def test_a_capture_that_fails_is_ended_and_the_next_one_works(cuda, capture):
    def fails_when_captured():
        if cuda.calls[-1] == "begin":
            raise RuntimeError("operation not permitted when stream is capturing")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="not permitted"):
            capture(fails_when_captured)
        assert cuda.calls[-1] == "end"
        assert gc.isenabled()
    kept = capture(lambda: None)
    assert kept is not None
