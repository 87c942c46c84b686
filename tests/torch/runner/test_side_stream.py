"""Work beside the steps, launched by a thread of its own, under CUDA's rules."""

import threading
import weakref

import pytest
import torch

import tests.torch.interpreted_triton  # noqa: F401 (first)
from krea2_srt.runner.side_stream import CudaSideStream
from tests.channel import PATIENCE_S
from tests.torch.cuda_rules import cuda_rules

CUDA = torch.device("cuda", 0)


@pytest.fixture
def cuda():
    with cuda_rules() as machine, torch.inference_mode():
        yield machine


@pytest.fixture
def side(cuda):
    side = CudaSideStream(CUDA)
    yield side
    side.close()


def result_of(job):
    job.launched.wait(PATIENCE_S)
    while (found := job.result()) is None:
        pass
    return found


def test_the_submitting_thread_launches_nothing_and_waits_for_nothing(cuda, side):
    x = torch.zeros(8, device=CUDA)
    seen = []

    def work():
        seen.append((threading.current_thread(), torch.cuda.current_stream()))
        assert torch.is_inference_mode_enabled()
        return x + 1, x.isfinite().all()

    with cuda.no_waits():
        job = side.start(work, (x,))
        found, finite = result_of(job)
    assert seen[0][0] is not threading.current_thread()
    assert seen[0][1] is not torch.cuda.current_stream()
    assert found.is_pinned()
    assert finite


def test_inputs_are_freed_only_once_the_device_reads_them(cuda, side):
    """An allocator that is told of the stream looks at what has been launched on it by then."""
    go = threading.Event()
    x = torch.zeros(8, device=CUDA)
    gone = weakref.ref(x)

    def work():
        go.wait(PATIENCE_S)
        return (inputs.pop() + 1,)

    inputs = [x]
    job = side.start(work, (x,))
    del x
    assert gone() is not None
    go.set()
    result_of(job)
    side.wait()
    assert gone() is None


def test_what_it_raises_is_raised_where_the_result_is_asked_for(side):
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory")

    failed, fine = side.start(fail, ()), side.start(lambda: (torch.zeros(1, device=CUDA),), ())
    failed.launched.wait(PATIENCE_S)
    with pytest.raises(torch.OutOfMemoryError):
        failed.result()
    assert len(result_of(fine)) == 1


def test_to_wait_is_to_wait_for_all_that_was_started(side):
    done = []
    for number in range(5):
        side.start(lambda number=number: done.append(number) or (), ())
    side.wait()
    assert done == [0, 1, 2, 3, 4]


def test_closing_ends_the_thread_and_loses_nothing(cuda):
    side = CudaSideStream(CUDA)
    done = []
    side.start(lambda: done.append(1) or (), ())
    side.close()
    assert done == [1]
    assert not side._thread.is_alive()
