"""Each rule of the model of CUDA, broken on purpose and kept."""

import contextlib
import gc
import threading
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

import tests.torch.interpreted_triton  # noqa: F401 (first)
from krea2_srt.kernels import euler, norm
from krea2_srt.kernels.segment_index import SegmentIndex
from tests.torch.cuda_rules import CudaError, Machine, Rule, RuleError, cuda_rules
from tests.torch.cuda_rules.triton_writes import written_arguments

CUDA = torch.device("cuda", 0)


@pytest.fixture
def cuda() -> Iterator[Machine]:
    with cuda_rules(memory=2**20) as machine, torch.inference_mode():
        yield machine


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=CUDA)


def pinned(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).pin_memory()


class Captured:
    """A function on a stream of its own: warmed up, then captured."""

    def __init__(self, function, warm_up=None, pool=None) -> None:
        self.stream = torch.cuda.Stream()
        self.graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            (function if warm_up is None else warm_up)()
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            self.graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                self.result = function()
            finally:
                self.graph.capture_end()


def test_a_violation_that_somebody_catches_is_raised_at_the_end():
    with pytest.raises(RuleError, match="read by"), cuda_rules() as cuda:
        with cuda.breaks(Rule.RACE):
            race()
        assert cuda.violations == []
        with contextlib.suppress(RuleError):
            race()


def refused(function):
    def run():
        with pytest.raises(RuleError):
            function()

    return run


def race() -> None:
    x, side = zeros(4), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x + 1
    x.add_(1)


# What the host reads and waits for.


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.sum()),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: torch.empty(4).copy_(x),
        lambda x: torch.empty(4).pin_memory().copy_(x),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
    ],
)
def test_the_host_reads_nothing_in_a_capture(cuda, read):
    x = zeros(4)
    with cuda.breaks(Rule.HOST_READ):
        Captured(lambda: read(x), warm_up=lambda: None)


@pytest.mark.parametrize(
    "copy",
    [
        lambda x: torch.ones(4).to(CUDA),
        lambda x: torch.tensor([1.0], device=CUDA),
        lambda x: x.copy_(torch.ones(4), non_blocking=True),
        lambda x: x.copy_(torch.ones(1).pin_memory(), non_blocking=True),  # goes by a temporary one
        lambda x: x.copy_(torch.ones(4, dtype=torch.int32).pin_memory(), non_blocking=True),
        lambda x: x[torch.tensor([1, 2])],
    ],
)
def test_no_pageable_memory_is_copied_in_a_capture(cuda, copy):
    x = zeros(4)
    with cuda.breaks(Rule.PAGEABLE):
        Captured(lambda: copy(x), warm_up=lambda: None)


@pytest.mark.parametrize(
    "wait",
    [
        lambda: torch.cuda.synchronize(),
        lambda: torch.cuda.current_stream().synchronize(),
        lambda: torch.cuda.Event().synchronize(),
        lambda: torch.cuda.Event().query(),
    ],
)
def test_the_host_waits_for_nothing_in_a_capture(cuda, wait):
    Captured(lambda: zeros(4))
    with cuda.breaks(Rule.WAIT):
        Captured(wait, warm_up=lambda: None)


def test_another_thread_may_wait_for_its_own_stream_but_not_for_the_device(cuda):
    def elsewhere(wait):
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join()

    mine = torch.cuda.current_stream()
    Captured(lambda: elsewhere(mine.synchronize))
    with cuda.breaks(Rule.WAIT):
        wait = refused(torch.cuda.synchronize)
        Captured(lambda: elsewhere(wait), warm_up=lambda: None)


def test_waits_outside_of_captures_are_counted(cuda):
    x = zeros(4)
    host, ready = pinned(1, 2, 3, 4), torch.empty(4, pin_memory=True)
    with cuda.no_waits():
        x.copy_(host, non_blocking=True)
        ready.copy_(x, non_blocking=True)
        x.to("cpu", non_blocking=True)
        x.add_(1)
    for wait in (
        lambda: x.sum().item(),
        lambda: x.tolist(),
        lambda: torch.ones(4).to(CUDA),
        lambda: x.copy_(host),
        lambda: torch.empty(4).copy_(x, non_blocking=True),
        torch.cuda.synchronize,
    ):
        with pytest.raises(AssertionError), cuda.no_waits():
            wait()


def test_a_device_that_has_more_to_do_does_not_run_dry(cuda):
    x, event = zeros(4), torch.cuda.Event()
    event.record()
    x.add_(1)
    event.synchronize()
    assert cuda.waits == ["synchronize of an event"]
    assert cuda.ran_dry == []
    torch.cuda.synchronize()
    assert cuda.ran_dry == ["synchronize of the device"]


def test_what_the_host_reads_is_zero_and_finite(cuda):
    x = zeros(3)
    assert x.tolist() == [0, 0, 0]
    assert torch.isfinite(x).all()
    assert not torch.isnan(x).any()
    assert not (x != 0).any()
    assert (x.cpu() == 0).all()
    cuda.read = lambda tensor, number: 7
    assert x.sum().item() == 7
    assert x.cpu().tolist() == [7, 7, 7]


# Captures and pools.


def test_a_spoilt_capture_leaves_its_pool_open(cuda):
    x, pool = zeros(4), torch.cuda.graph_pool_handle()
    kept = Captured(lambda: x + 1, pool=pool)
    with cuda.breaks(Rule.HOST_READ), pytest.raises(CudaError, match="previous error"):
        Captured(lambda: x.sum().item(), warm_up=lambda: None, pool=pool)
    with cuda.breaks(Rule.POOL), pytest.raises(RuleError, match="already recording"):
        Captured(lambda: x + 1, pool=pool)
    x = zeros(4)
    side = torch.cuda.Stream()
    x.record_stream(side)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x + 1
    del x
    reserved = torch.cuda.memory_reserved()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == reserved, "cached blocks were released"
    assert cuda.allocator.deferred_bytes == 512
    torch._C._cuda_endAllocateToPool(0, pool)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < reserved
    assert cuda.allocator.deferred_bytes == 0
    x = zeros(4)
    kept = Captured(lambda: x + 1, pool=pool), kept
    kept[0].graph.replay()


def test_a_spoilt_capture_takes_nothing_more(cuda):
    x = zeros(4)

    def spoilt():
        with pytest.raises(RuleError):
            x.sum().item()
        x.add_(1)

    with cuda.breaks(Rule.HOST_READ), pytest.raises(CudaError, match="previous error"):
        Captured(spoilt, warm_up=lambda: None)


def test_no_capture_begins_twice_on_one_pool(cuda):
    pool = torch.cuda.graph_pool_handle()

    def capture_inside():
        inner = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.Stream()):
            inner.capture_begin(pool=pool)

    def elsewhere():
        thread = threading.Thread(target=refused(capture_inside))
        thread.start()
        thread.join()

    with cuda.breaks(Rule.POOL):
        Captured(elsewhere, warm_up=lambda: None, pool=pool)
    with cuda.breaks(Rule.OUTSIDE):
        Captured(capture_inside, warm_up=lambda: None, pool=torch.cuda.graph_pool_handle())


def test_a_pool_ends_with_its_last_graph(cuda):
    x, pool = zeros(4), torch.cuda.graph_pool_handle()
    first = Captured(lambda: x + 1, pool=pool)
    second = Captured(lambda: x + 1, pool=pool)
    del first
    third = Captured(lambda: x + 1, pool=pool)
    del second, third
    gc.collect()
    with cuda.breaks(Rule.POOL):
        Captured(lambda: x + 1, pool=pool)


def test_the_default_stream_is_not_captured(cuda):
    with cuda.breaks(Rule.OUTSIDE):
        torch.cuda.CUDAGraph().capture_begin()


def test_a_pool_of_our_own_takes_what_is_allocated_while_it_is_used(cuda):
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        x = zeros(4)
        assert cuda.allocator.recording == [pool.id]
    assert x.memory.pool == pool.id
    assert zeros(4).memory.pool != pool.id
    graph = Captured(lambda: x + 1, pool=pool.id)
    graph.graph.replay()


# Order between streams.


def on(stream, function, after=None):
    if after is not None:
        stream.wait_stream(after)
    with torch.cuda.stream(stream):
        return function()


@pytest.fixture
def side(cuda):
    return torch.cuda.Stream()


def test_what_one_stream_wrote_another_reads_only_in_order(cuda, side):
    x, main = zeros(4), torch.cuda.current_stream()
    with cuda.breaks(Rule.RACE):
        on(side, lambda: x + 1)
    on(side, lambda: x + 1, after=main)
    x = zeros(4)
    event = torch.cuda.Event()
    event.record()
    with torch.cuda.stream(side):
        event.wait()
        x + 1
    x = zeros(4)
    torch.cuda.synchronize()
    on(side, lambda: x + 1)


def test_an_event_orders_only_what_was_before_it(cuda, side):
    event = torch.cuda.Event()
    event.record()
    x = zeros(4)
    with cuda.breaks(Rule.RACE), torch.cuda.stream(side):
        side.wait_event(event)
        x + 1


def test_order_goes_on_from_stream_to_stream(cuda, side):
    third = torch.cuda.Stream()
    x = zeros(4)
    on(side, lambda: None, after=torch.cuda.current_stream())
    on(third, lambda: x + 1, after=side)


def test_what_another_stream_reads_is_written_only_in_order(cuda, side):
    x, main = zeros(4), torch.cuda.current_stream()
    on(side, lambda: x + 1, after=main)
    x + 1  # two may read at a time
    with cuda.breaks(Rule.RACE):
        x.add_(1)
    main.wait_stream(side)
    x.add_(1)


def test_parts_of_one_memory_may_be_used_apart(cuda, side):
    x = zeros(8)
    on(side, lambda: x[:4].add_(1), after=torch.cuda.current_stream())
    x[4:].add_(1)
    with cuda.breaks(Rule.RACE):
        x[3:].add_(1)


def test_a_query_that_says_done_is_as_good_as_a_wait(cuda, side):
    x = on(side, lambda: zeros(4))
    event = side.record_event()
    assert not event.query()
    with cuda.breaks(Rule.RACE):
        x + 1
    assert event.query()
    x + 1


def test_memory_is_not_handed_out_while_another_stream_uses_it(cuda, side):
    def used_on_another_stream(recorded, waits):
        x = zeros(4)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x + 1
        if recorded:
            x.record_stream(side)
        if waits:
            torch.cuda.current_stream().wait_stream(side)
        del x
        zeros(4)

    used_on_another_stream(recorded=True, waits=False)
    used_on_another_stream(recorded=False, waits=True)
    with cuda.breaks(Rule.LIFETIME):
        used_on_another_stream(recorded=False, waits=False)


def test_threads_have_streams_of_their_own(cuda, side):
    seen = []
    with torch.cuda.stream(side):
        thread = threading.Thread(target=lambda: seen.append(torch.cuda.current_stream()))
        thread.start()
        thread.join()
    assert seen == [torch.cuda.default_stream()]


def test_a_thread_sees_the_same_device(cuda, side):
    made = []

    def make():
        with torch.inference_mode(), torch.cuda.stream(side):
            made.append(torch.ones(4, device=CUDA) + 1)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    with cuda.breaks(Rule.RACE):
        made[0] + 1


# Pinned memory.


def test_pinned_memory_is_written_again_only_after_its_event(cuda):
    x, host = zeros(4), pinned(1, 2, 3, 4)
    x.copy_(host, non_blocking=True)
    assert host.tolist() == [1, 2, 3, 4]  # both may read
    with cuda.breaks(Rule.PINNED):
        host.fill_(5)
    event = torch.cuda.Event()
    event.record()
    event.synchronize()
    host.fill_(5)


@pytest.mark.parametrize(
    "read", [lambda host: host.tolist(), lambda host: host.numpy(), lambda host: host[0].item()]
)
def test_what_comes_from_the_device_is_read_only_after_its_event(cuda, read):
    x, host = zeros(4), torch.empty(4, pin_memory=True)
    host.copy_(x, non_blocking=True)
    with cuda.breaks(Rule.PINNED):
        read(host)
    event = torch.cuda.Event()
    event.record()
    assert not event.query()
    assert event.query()
    read(host)


def test_slots_of_one_pinned_buffer_are_apart(cuda):
    x, ring = zeros(4), torch.empty(2, 4).pin_memory()
    x.copy_(ring[0], non_blocking=True)
    ring[1].fill_(1)
    with cuda.breaks(Rule.PINNED):
        ring[0].fill_(1)


def test_two_copies_into_one_pinned_buffer_have_an_order(cuda, side):
    x, host = zeros(4), torch.empty(4, pin_memory=True)
    host.copy_(x, non_blocking=True)
    with cuda.breaks(Rule.RACE), torch.cuda.stream(side):
        side.wait_event(torch.cuda.Event())
        y = zeros(4)
        host.copy_(y, non_blocking=True)


def test_torch_keeps_its_own_pinned_memory_until_the_copy_is_done(cuda):
    x = zeros(4)
    x.copy_(pinned(1, 2, 3, 4), non_blocking=True)
    with cuda.breaks(Rule.PINNED):
        x.copy_(cuda.pin(torch.ones(4), foreign=True), non_blocking=True)


def test_host_memory_is_registered_once_and_until_its_copies_are_done(cuda):
    host, runtime = torch.zeros(2**12, dtype=torch.uint8), torch.cuda.cudart()
    assert not host.is_pinned()
    assert runtime.cudaHostRegister(host.data_ptr(), host.nbytes, 0) == 0
    assert host.is_pinned()
    assert host[7:9].is_pinned()
    assert runtime.cudaHostRegister(host.data_ptr() + 64, 64, 0) == 712  # already
    x = zeros(2**12, dtype=torch.uint8)
    with cuda.no_waits():
        x.copy_(host, non_blocking=True)
    with cuda.breaks(Rule.PINNED):
        host[5] = 1
    with cuda.breaks(Rule.PINNED):
        runtime.cudaHostUnregister(host.data_ptr())
    assert not host.is_pinned()
    assert runtime.cudaHostUnregister(host.data_ptr()) == 713  # not any more
    assert runtime.cudaHostRegister(host.data_ptr(), host.nbytes, 0) == 0
    x.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    host[5] = 1
    assert runtime.cudaHostUnregister(host.data_ptr()) == 0


# Plans.


@pytest.mark.parametrize("side_pixels", [8, 16])
def test_convolutions_are_planned_before_they_are_captured(cuda, side_pixels):
    x, weight = zeros(1, 3, side_pixels, side_pixels), zeros(4, 3, 3, 3)
    other = zeros(1, 3, 12, 12)
    Captured(lambda: F.conv2d(x, weight)).graph.replay()
    with cuda.breaks(Rule.PLAN):
        Captured(lambda: F.conv2d(x, weight), warm_up=lambda: F.conv2d(other, weight))


def test_attention_and_products_are_planned_before_they_are_captured(cuda):
    q, a = zeros(1, 2, 8, 32, dtype=torch.bfloat16), zeros(16, 32, dtype=torch.bfloat16)
    mask = zeros(8, 8, dtype=torch.bool)
    e, ones = a.to(torch.float8_e4m3fn), torch.ones(16, 1, device=CUDA)
    for function in (
        lambda: F.scaled_dot_product_attention(q, q, q),
        lambda: F.scaled_dot_product_attention(q, q, q, attn_mask=mask),
        lambda: a @ a.t(),
        lambda: torch.mm(a, a.t(), out_dtype=torch.float32),
        lambda: torch._scaled_mm(
            e, e.t(), scale_a=ones, scale_b=ones.t(), out_dtype=torch.bfloat16
        ),
    ):
        with cuda.breaks(Rule.PLAN):
            Captured(function, warm_up=lambda: None)
        Captured(function).graph.replay()


def test_another_stream_or_thread_has_its_own_plans(cuda, side):
    a = zeros(16, 32, dtype=torch.bfloat16)
    a @ a.t()
    torch.cuda.synchronize()
    with cuda.breaks(Rule.PLAN):
        Captured(lambda: a @ a.t(), warm_up=lambda: None)


# Graphs' memory.


def test_a_graph_that_was_reset_is_not_replayed(cuda):
    x = zeros(4)
    captured = Captured(lambda: x + 1)
    captured.graph.replay()
    captured.graph.reset()
    with cuda.breaks(Rule.RELEASED):
        captured.graph.replay()
    with cuda.breaks(Rule.RELEASED):
        torch.cuda.CUDAGraph().replay()


def test_what_a_capture_allocated_goes_with_its_graph(cuda):
    x = zeros(4)
    captured = Captured(lambda: x + 1)
    y = captured.result
    captured.graph.replay()
    y + 1
    del captured
    gc.collect()
    with cuda.breaks(Rule.RELEASED):
        y + 1


def test_what_a_graph_reads_must_be_there_when_it_is_replayed(cuda):
    x, weight = zeros(4), zeros(4)
    captured = Captured(lambda: x.copy_(x * weight))
    captured.graph.replay()
    weight = weight.cpu()
    with cuda.breaks(Rule.INPUT):
        captured.graph.replay()


def test_a_replay_is_ordered_like_any_work(cuda, side):
    x = zeros(4)
    captured = Captured(lambda: x.add_(1))
    on(side, lambda: x + 1, after=torch.cuda.current_stream())
    with cuda.breaks(Rule.RACE):
        captured.graph.replay()
    torch.cuda.current_stream().wait_stream(side)
    captured.graph.replay()
    with cuda.breaks(Rule.RACE):
        on(side, lambda: x + 1)


def test_graphs_of_one_pool_run_one_at_a_time(cuda, side):
    x, y, pool = zeros(4), zeros(4), torch.cuda.graph_pool_handle()
    first = Captured(lambda: x.copy_(x + 1), pool=pool)
    second = Captured(lambda: y.copy_(y + 1), pool=pool)
    first.graph.replay()
    with cuda.breaks(Rule.RACE):
        on(side, second.graph.replay)
    on(side, second.graph.replay, after=torch.cuda.current_stream())


def test_a_capture_works_and_allocates_on_its_own_streams(cuda, side):
    x = zeros(4)
    with cuda.breaks(Rule.OUTSIDE):
        Captured(lambda: on(side, lambda: zeros(4)), warm_up=lambda: None)
    with cuda.breaks(Rule.OUTSIDE):
        Captured(lambda: on(side, lambda: x.add_(1)), warm_up=lambda: None)

    def forked():
        origin = torch.cuda.current_stream()
        on(side, lambda: x.add_(1), after=origin)
        origin.wait_stream(side)

    Captured(forked, warm_up=lambda: x.add_(1)).graph.replay()
    with cuda.breaks(Rule.OUTSIDE):
        Captured(
            lambda: on(side, lambda: x.add_(1), after=torch.cuda.current_stream()),
            warm_up=lambda: x.add_(1),
        )
    with cuda.breaks(Rule.OUTSIDE):
        Captured(lambda: torch.cuda.current_stream().wait_stream(side))


def test_work_in_a_fork_of_a_capture_has_an_order_too(cuda, side):
    x = zeros(4)

    def forked():
        origin = torch.cuda.current_stream()
        on(side, lambda: x.add_(1), after=origin)
        x.add_(1)
        origin.wait_stream(side)

    with cuda.breaks(Rule.RACE):
        Captured(forked, warm_up=lambda: None)


def test_the_cache_is_not_emptied_in_a_capture(cuda):
    with cuda.breaks(Rule.OUTSIDE):
        Captured(torch.cuda.empty_cache, warm_up=lambda: None)


def test_noise_is_not_sampled_in_a_capture(cuda):
    generator = torch.Generator(CUDA).manual_seed(1)
    torch.randn(4, device=CUDA, generator=generator)
    with cuda.breaks(Rule.OUTSIDE):
        Captured(lambda: torch.randn(4, device=CUDA, generator=generator))


def test_a_capture_is_what_was_warmed_up(cuda):
    x = zeros(4)
    calls = []

    def other_the_second_time():
        calls.append(1)
        return x + 1 if len(calls) == 1 else x * 2

    with cuda.breaks(Rule.DIFFERENT):
        Captured(other_the_second_time)
    with cuda.breaks(Rule.DIFFERENT):
        Captured(lambda: x + 1, warm_up=lambda: x[:2] + 1)

    def asks_torch():  # as transformers does
        return x + 1 if torch.cuda.is_current_stream_capturing() else x * 2

    with cuda.breaks(Rule.DIFFERENT):
        Captured(asks_torch)
    Captured(lambda: x + 1, warm_up=lambda: (x * 2, x + 1, x * 2))


def test_a_capture_that_failed_in_python_is_whole_for_cuda_but_never_replayed(cuda):
    x, graphs = zeros(4), []

    def fails():
        if torch.cuda.is_current_stream_capturing():
            x.mul_(2)
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        graphs.append(Captured(fails))
    assert cuda.allocator.recording == []


# Triton.


def test_what_a_kernel_writes_is_read_from_its_source():
    def pointers(kernel):
        return {name for name in written_arguments(kernel) if name.endswith("_ptr")}

    assert pointers(norm._norm_kernel) == {"x_ptr", "out_ptr", "out_scale_ptr"}
    (kernel,) = (v for name, v in vars(euler).items() if name.endswith("_kernel"))
    assert pointers(kernel) == {"tokens_ptr", "guided_ptr", "non_finite_ptr"}


def test_a_kernel_is_an_operation(cuda, side):
    x, table = zeros(8, 64), zeros(1, 64)
    rows = SegmentIndex(zeros(8, dtype=torch.int32), None)
    launched = cuda.launched
    out = norm.norm_scale_shift_triton(x, table, table, rows, 1e-5)
    assert cuda.launched == launched + 1
    with cuda.breaks(Rule.RACE):
        on(side, lambda: out + 1)
    side.wait_stream(torch.cuda.current_stream())
    on(side, lambda: table + 1)
    norm.norm_scale_shift_triton(x, table, table, rows, 1e-5)  # reads the table as well


# Memory.


def test_memory_is_counted_and_runs_out(cuda):
    assert torch.cuda.mem_get_info() == (2**20, 2**20)
    x = zeros(2**17)
    assert torch.cuda.memory_allocated() == 2**19
    with pytest.raises(torch.OutOfMemoryError):
        zeros(2**18)
    del x
    assert torch.cuda.memory_allocated() == 0
    assert torch.cuda.memory_reserved() == 2**19
    x = zeros(2**17)
    assert torch.cuda.memory_reserved() == 2**19
    del x
    zeros(2**18)  # the cache is given back for it
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == 0
    assert torch.cuda.max_memory_allocated() == torch.cuda.max_memory_reserved() == 2**20


@pytest.mark.parametrize("number", [1, 2, 3])
def test_any_allocation_can_fail(cuda, number):
    cuda.fail_allocations(number)
    for _ in range(number - 1):
        zeros(4)
    with pytest.raises(torch.OutOfMemoryError):
        zeros(4)
    zeros(4)


def test_the_device_is_gone_with_the_rules():
    available = torch.cuda.is_available()
    with cuda_rules():
        assert torch.cuda.is_available()
    assert torch.cuda.is_available() is available
