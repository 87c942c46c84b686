"""Puts the machine where torch's CUDA would be, and takes it away again."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from tests.torch.cuda_rules.machine import Machine
from tests.torch.cuda_rules.memory import DEFAULT_POOL
from tests.torch.cuda_rules.tensors import CUDA, DeviceTensor

GIB = 2**30


class _Mode(TorchDispatchMode):
    """The mode of one thread."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self._machine = machine

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and the import alone takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._machine.dispatch(func, args, kwargs or {})


class _Pool:
    """`torch.cuda.MemPool`."""

    machine: Machine

    def __init__(self, *_: Any, **__: Any) -> None:
        self.id = self.machine.graph_pool_handle()
        self.machine.allocator.holders[self.id] = 1

    def __del__(self) -> None:
        self.machine.allocator.holders[self.id] -= 1


class _Generator(torch.Generator):
    """`torch.Generator` of any device; that of a GPU is the host's, whose numbers nobody sees."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        return super().__new__(cls, "cpu")


@contextmanager
def cuda_rules(
    memory: int = 139 * GIB, name: str = "rules of CUDA", capability: tuple[int, int] = (9, 0)
) -> Iterator[Machine]:
    """A GPU that holds production code to CUDA's rules and computes nothing.

    Args:
        memory: bytes of the device.
        name: of the device.
        capability: its compute capability.

    Raises:
        RuleError: at the latest at the end, if a rule was broken.
    """
    machine = Machine(memory)
    _forget_caches()
    with ExitStack() as stack:
        for owner, attribute, value in _replacements(machine, name, capability):
            stack.enter_context(mock.patch.object(owner, attribute, value, create=True))
        # As torch's fake tensors do on a machine without a GPU.
        torch._C._ensureCUDADeviceGuardSet()
        lift = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, lift)
        stack.callback(_forget_caches)
        stack.enter_context(_Mode(machine))
        yield machine
    machine.open = False
    if machine.violations:
        raise machine.violations[0]


def _forget_caches() -> None:
    """What our functions remember may be tensors of a device that is gone, or not yet there."""
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("krea2_srt"):
            for value in list(vars(module).values()):
                if callable(clear := getattr(value, "cache_clear", None)):
                    clear()


def _replacements(
    machine: Machine, name: str, capability: tuple[int, int]
) -> Iterator[tuple[Any, str, Any]]:
    allocator = machine.allocator
    cuda = torch.cuda
    properties = SimpleNamespace(
        name=name,
        major=capability[0],
        minor=capability[1],
        total_memory=allocator.limit,
        multi_processor_count=132,
        warp_size=32,
        regs_per_multiprocessor=65536,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472,
        max_threads_per_multi_processor=2048,
        L2_cache_size=60 * 2**20,
    )

    def number(get: Callable[[], int]) -> Callable[..., int]:
        def ask(device: Any = None) -> int:
            with machine.lock:
                machine.reap()
                return get()

        return ask

    def reset_peaks(device: Any = None) -> None:
        allocator.peak, allocator.peak_reserved = allocator.allocated, allocator.reserved

    def memory_stats(device: Any = None) -> dict[str, int]:
        machine.reap()
        return {
            "allocated_bytes.all.current": allocator.allocated,
            "allocated_bytes.all.peak": allocator.peak,
            "active_bytes.all.current": allocator.allocated + allocator.deferred_bytes,
            "reserved_bytes.all.current": allocator.reserved,
            "reserved_bytes.all.peak": allocator.peak_reserved,
            "num_alloc_retries": 0,
            "num_ooms": allocator.out_of_memory,
        }

    def capturing() -> bool:
        return machine.current_stream().capture is not None

    @contextmanager
    def stream(stream: Any) -> Iterator[None]:
        outer = machine.local.stream
        if stream is not None:
            machine.local.stream = stream
        try:
            yield
        finally:
            machine.local.stream = outer

    @contextmanager
    def device(device: Any) -> Iterator[None]:
        yield

    def memory_info(device: Any = None) -> tuple[int, int]:
        machine.reap()
        return allocator.limit - allocator.reserved, allocator.limit

    functions: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": device,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: name,
        "is_bf16_supported": lambda *_, **__: True,
        "Stream": machine.Stream,
        "Event": machine.Event,
        "CUDAGraph": machine.CUDAGraph,
        "cudart": lambda: SimpleNamespace(
            cudaHostRegister=machine.register_host, cudaHostUnregister=machine.unregister_host
        ),
        "MemPool": type("MemPool", (_Pool,), {"machine": machine}),
        "graph_pool_handle": machine.graph_pool_handle,
        "is_current_stream_capturing": capturing,
        "current_stream": machine.current_stream,
        "default_stream": lambda device=None: machine.default,
        "set_stream": machine.set_stream,
        "stream": stream,
        "synchronize": machine.synchronize,
        "empty_cache": machine.empty_cache,
        "mem_get_info": memory_info,
        "memory_stats": memory_stats,
        "memory_allocated": number(lambda: allocator.allocated),
        "memory_reserved": number(lambda: allocator.reserved),
        "max_memory_allocated": number(lambda: allocator.peak),
        "max_memory_reserved": number(lambda: allocator.peak_reserved),
        "reset_peak_memory_stats": reset_peaks,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
    }
    for attribute, value in functions.items():
        yield cuda, attribute, value
    for module in (cuda.graphs, cuda.memory, cuda.streams):
        for attribute, value in functions.items():
            if hasattr(module, attribute):
                yield module, attribute, value
    yield torch, "Generator", _Generator

    def begin_of_thread(device: int, pool: Any) -> None:
        allocator.begin(pool)
        machine.local.pool = pool

    def end(device: int, pool: Any) -> None:
        allocator.end(pool)
        if machine.local.pool == pool:
            machine.local.pool = None

    low = {
        "_cuda_beginAllocateCurrentThreadToPool": begin_of_thread,
        "_cuda_beginAllocateToPool": lambda device, pool: allocator.begin(pool),
        "_cuda_endAllocateToPool": end,
        "_cuda_releasePool": lambda device, pool: allocator.release(pool),
    }
    for attribute, value in low.items():
        yield torch._C, attribute, value
        if hasattr(cuda.memory, attribute):  # by name in torch.cuda.use_mem_pool
            yield cuda.memory, attribute, value
    yield from _tensor_methods(machine)
    for kind in (JITFunction, InterpretedFunction):
        yield kind, "run", _run(machine, kind.run)
    yield threading.Thread, "_bootstrap_inner", _bootstrap(machine)


def _tensor_methods(machine: Machine) -> Iterator[tuple[Any, str, Any]]:
    """Those that read a host's memory past the dispatcher, and one with a stream of torch's own."""
    numpy, to_list = torch.Tensor.numpy, torch.Tensor.tolist

    def read_numpy(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        machine.host_use(self, False, "numpy")
        return numpy(self, *args, **kwargs)

    def read_list(self: torch.Tensor) -> Any:
        host = self.cpu() if isinstance(self, DeviceTensor) else self
        machine.host_use(host, False, "tolist")
        return to_list(host)

    def record_stream(self: torch.Tensor, stream: Any) -> None:
        assert isinstance(self, DeviceTensor)
        self.memory.recorded.add(stream.stream_id)

    yield torch.Tensor, "numpy", read_numpy
    yield torch.Tensor, "tolist", read_list
    yield torch.Tensor, "record_stream", record_stream


def _run(machine: Machine, real: Any) -> Any:
    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if any(isinstance(a, DeviceTensor) for a in (*args, *kwargs.values())):
            machine.launch(self, args, kwargs)
            return None
        return real(self, *args, grid=grid, warmup=warmup, **kwargs)

    return run


def _bootstrap(machine: Machine) -> Any:
    """Threads that begin under the rules are under them."""
    real = threading.Thread._bootstrap_inner  # type: ignore[attr-defined]

    def bootstrap(self: threading.Thread) -> None:
        with _Mode(machine):
            real(self)

    return bootstrap


__all__ = ["CUDA", "DEFAULT_POOL", "cuda_rules"]
