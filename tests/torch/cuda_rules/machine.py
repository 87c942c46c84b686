"""The machine: takes every operation that production code queues, and holds it to the rules."""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from tests.torch.cuda_rules.graph import Capture, Graph
from tests.torch.cuda_rules.memory import DEFAULT_POOL, Allocator, Handle, Memory, PoolId, Span
from tests.torch.cuda_rules.operations import Operation, operation
from tests.torch.cuda_rules.rules import CudaError, Rule, RuleError
from tests.torch.cuda_rules.streams import Clock, Event, Stream, merge
from tests.torch.cuda_rules.tensors import CUDA, DeviceTensor, Shapes, extent, span, tensors_of
from tests.torch.cuda_rules.triton_writes import written_arguments

aten = torch.ops.aten

PAGE = 4096

_SHAPES = Shapes()
"""The same for all machines."""


class _Local(threading.local):
    """The state of a thread."""

    stream: Stream | None = None
    capture: Graph | None = None
    pool: PoolId | None = None


class Machine:
    """A CUDA device that computes nothing.

    Attributes:
        violations: of rules, also of those whose error somebody caught.
        waits: what the host has waited for, in words; outside of captures that is no violation.
        ran_dry: those of them after which the device had nothing left to do.
        looks: at an event, for which it is not done.
        read: may change a number that the host reads, from the tensor and what it would be.
        allocator: of the device's memory.
        registered: host memory that is pinned where it was, by its address.
        launched: how many operations were queued.
    """

    def __init__(self, limit: int) -> None:
        self.lock = threading.RLock()
        self.open = True
        self.violations: list[RuleError] = []
        self.waits: list[str] = []
        self.ran_dry: list[str] = []
        self.looks = 1
        self.read: Callable[[Tensor, int], float] | None = None
        self.local = _Local()
        self.streams: list[Stream] = []
        self.captures: list[Graph] = []
        self.host: Clock = {}
        self.work = 0
        self.launched = 0
        self.dead: deque[Memory] = deque()
        self.allocator = Allocator(self, limit)
        self.Stream = type("Stream", (Stream,), {"machine": self})
        self.Event = type("Event", (Event,), {"machine": self})
        self.CUDAGraph = type("CUDAGraph", (Graph,), {"machine": self})
        self.default = self.Stream()
        self._pinned: dict[int, Memory] = {}
        self.registered: dict[int, Memory] = {}
        self._pools: dict[PoolId, Memory] = {}
        self._num_pools = 0
        self._plans: set[Any] = set()

    # What tests ask for.

    @contextmanager
    def breaks(self, rule: Rule) -> Iterator[None]:
        """For code that is to break a rule, whoever catches the error."""
        before = len(self.violations)
        with suppress(CudaError):
            yield
        broken = [error.rule for error in self.violations[before:]]
        assert broken, f"nothing broke the rule: {rule.value}"
        assert set(broken) == {rule}, f"not {rule}, but {self.violations[before:]}"
        del self.violations[before:]

    @contextmanager
    def no_waits(self) -> Iterator[None]:
        """For code in which the host does not wait for the device."""
        before = len(self.waits)
        yield
        assert not self.waits[before:], self.waits[before:]

    def fail_allocations(self, *numbers: int) -> None:
        """Let some of the allocations to come run out of memory; 1 is the next one."""
        self.allocator.fail_at = {self.allocator.count + number for number in numbers}

    # What streams, graphs and memory ask for.

    def fail(self, rule: Rule, text: str) -> None:
        """A rule was broken."""
        error = RuleError(rule, text)
        self.violations.append(error)
        raise error

    def current_stream(self, device: Any = None) -> Stream:
        return self.local.stream or self.default

    def set_stream(self, stream: Stream | None) -> None:
        self.local.stream = stream

    def graph_pool_handle(self) -> PoolId:
        self._num_pools += 1
        return (0, self._num_pools)

    def pool_memory(self, pool: PoolId) -> Memory:
        """Stands for what graphs of a pool share."""
        return self._pools.setdefault(pool, Memory(1, None))

    def reap(self) -> None:
        """Free the memory that nobody holds any more."""
        while self.dead:
            self.allocator.free(self.dead.popleft())

    def begin(self, stream: Stream) -> int:
        """The number of the next operation of a stream, which begins after what the host knows."""
        merge(stream.clock, self.host)
        stream.clock[stream.stream_id] += 1
        self.work += 1
        self.launched += 1
        return stream.clock[stream.stream_id]

    def no_capture(self, what: str, captured: Capture | None = None) -> None:
        """The host may not wait, or look, while its thread captures."""
        if (graph := self.local.capture) is not None:
            graph.invalidate(Rule.WAIT, f"{what} on {graph.origin}")
        if captured is not None:
            text = f"{what}, of work that is captured"
            if captured.graph is not None:
                captured.graph.invalidate(Rule.WAIT, text)
            self.fail(Rule.WAIT, text)

    def wait(self, clock: Clock, what: str, captured: Capture | None = None) -> None:
        """The host waits for the device."""
        with self.lock:
            self.reap()
            self.no_capture(what, captured)
            self._waited(what, clock)

    def _waited(self, what: str, clock: Clock) -> None:
        merge(self.host, clock)
        self.waits.append(what)
        if all(s.clock[s.stream_id] <= self.host.get(s.stream_id, 0) for s in self.streams):
            self.ran_dry.append(what)

    def synchronize(self, device: Any = None) -> None:
        """Waits for the whole device: it spoils the captures of all threads."""
        with self.lock:
            self.no_capture("synchronize of the device")
            for graph in self.captures:
                graph.invalidate(Rule.WAIT, "synchronize of the device by another thread")
            everything: Clock = {}
            for stream in self.streams:
                merge(everything, stream.clock)
            self._waited("synchronize of the device", everything)
            self.reap()

    def empty_cache(self) -> None:
        with self.lock:
            self.reap()
            if (graph := self.local.capture) is not None:
                graph.invalidate(Rule.OUTSIDE, "empty_cache in a capture")
            self.allocator.release_cached()

    def use(
        self, memory: Memory, stream: Stream, where: Span, write: bool, number: int, what: str
    ) -> None:
        """Hold one use of memory, by an operation that runs, to the rules."""
        if memory.graph is not None and memory.graph.released:
            self.fail(
                Rule.RELEASED, f"{what} uses {memory.num_bytes} bytes of a graph that is gone"
            )
        if found := memory.uses.conflict(stream.clock, stream.stream_id, where, write):
            self.fail(
                Rule.RACE,
                f"{what} {'writes' if write else 'reads'} {memory.num_bytes} bytes, {found}, "
                "with nothing between the two that waits",
            )
        memory.uses.note(stream.stream_id, where, write, number, what)

    # Pinned memory.

    def pinned(self, tensor: Tensor) -> Memory | None:
        """Its memory if it is pinned."""
        if isinstance(tensor, DeviceTensor) or not (self._pinned or self.registered):
            return None
        storage = tensor.untyped_storage()
        found = self._pinned.get(storage._cdata)
        return self.registered.get(storage.data_ptr()) if found is None else found

    def register_host(self, address: int, num_bytes: int, flags: int) -> int:
        """``cudaHostRegister``: pages can be locked only once, and CUDA takes whole ones."""
        start, end = _pages(address, num_bytes)
        for other, memory in self.registered.items():
            first, last = _pages(other, memory.num_bytes)
            if start < last and first < end:
                return 712  # cudaErrorHostMemoryAlreadyRegistered
        self.registered[address] = Memory(num_bytes, None, foreign=True)
        return 0

    def unregister_host(self, address: int) -> int:
        """``cudaHostUnregister``, after which the memory may go."""
        memory = self.registered.pop(address, None)
        if memory is None:
            return 713  # cudaErrorHostMemoryNotRegistered
        if self.open and memory.uses.pending(self.host):
            # Nobody may be there to catch it: it may be called by a finalizer.
            text = "registered memory is freed before its copy is done"
            self.violations.append(RuleError(Rule.PINNED, text))
        return 0

    def pin(self, tensor: Tensor, foreign: bool = False) -> Tensor:
        """From now on its memory is pinned."""
        storage = tensor.untyped_storage()
        memory = Memory(storage.nbytes(), None, foreign=foreign)
        key = storage._cdata
        self._pinned[key] = memory

        def free() -> None:
            del self._pinned[key]
            if foreign and memory.uses.pending(self.host):
                self.violations.append(
                    RuleError(Rule.PINNED, "registered memory is freed before its copy is done")
                )

        weakref.finalize(storage, free).atexit = False
        return tensor

    def host_use(self, tensor: Tensor, write: bool, what: str) -> None:
        """The host reads or writes a tensor of its own."""
        memory = self.pinned(tensor)
        if memory is None:
            return
        stream = -1  # the host's own
        if found := memory.uses.conflict(self.host, stream, span(tensor), write):
            self.fail(
                Rule.PINNED, f"the host {'writes' if write else 'reads'} it ({what}), {found}"
            )

    # Operations.

    def launch(self, kernel: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """A launch of a Triton kernel."""
        names = kernel.arg_names
        given = dict(zip(names, args, strict=False)) | kwargs
        written = written_arguments(kernel)
        uses, form = [], []
        for name in names:
            value = given.get(name)
            if isinstance(value, DeviceTensor):
                uses.append((value, name in written))
                form.append((tuple(value.shape), value.dtype))
            elif isinstance(value, Tensor):
                raise ValueError(
                    f"Pointer argument {name} cannot be accessed from Triton (cpu tensor?)"
                )
        with self.lock:
            self.reap()
            self._run(kernel.__name__, (kernel.__name__, *form), uses)

    def dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operation of torch's dispatcher."""
        tensors = tensors_of(args, kwargs)
        devices = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
        what = operation(func)
        if devices and what.packet is aten._has_compatible_shallow_copy_type:
            return False  # `Module.to` then makes new parameters, and the old ones go
        if not devices:
            target = kwargs.get("device")
            if target is None:
                target = next((a for a in args if isinstance(a, torch.device)), None)
            if target is None or torch.device(target).type != "cuda":
                return self._on_host(what, args, kwargs, tensors)
        with self.lock:
            self.reap()
            if what.reads:
                return self._read(what, devices)
            if what.moves:
                return self._to(func, args, kwargs)
            if what.packet is aten.copy_:
                return self._copy(*_bound(func, args, kwargs, "self", "src", "non_blocking"))
            if what.shaped_by_data or (
                what.packet is aten.index and any(t.dtype is torch.bool for t in tensors[1:])
            ):
                self._host_read(what.name)
                raise CudaError(f"{func} returns as much as the data says, which nobody knows here")
            return self._operation(what, args, kwargs, tensors, devices)

    def _on_host(
        self, what: Operation, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> Any:
        if what.packet in (aten.pin_memory, aten._pin_memory):
            self.host_use(tensors[0], False, "pin_memory")
            return self.pin(torch.clone(tensors[0]).contiguous())
        if what.packet is aten.is_pinned:
            return self.pinned(tensors[0]) is not None
        pin = kwargs.get("pin_memory")
        if pin:
            kwargs = kwargs | {"pin_memory": False}
        if (self._pinned or self.registered) and not what.views:
            written = what.written(args, kwargs)
            for tensor in tensors:
                self.host_use(tensor, any(tensor is w for w in written), what.name)
        result = what.func(*args, **kwargs)
        return self.pin(result) if pin else result

    def _operation(
        self,
        what: Operation,
        args: Any,
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        devices: list[DeviceTensor],
    ) -> Any:
        name = what.name
        if kwargs.get("generator") is not None:
            kwargs = kwargs | {"generator": None}
            if (graph := self.local.capture) is not None:
                graph.invalidate(Rule.OUTSIDE, f"{name} draws from a generator of its own")
        if len(tensors) > len(devices) and any(t.dim() and t.device.type == "cpu" for t in tensors):
            if not what.takes_host_indices:
                raise RuntimeError(f"Expected all tensors to be on the same device: {name}")
            self._pageable(f"{name} with indices on the host")
        outputs, several = _SHAPES.outputs(what.func, args, kwargs)
        written = what.written(args, kwargs)
        results: list[Any] = []
        new: list[DeviceTensor] = []
        for out in outputs:
            if out is None:
                results.append(None)
            elif out.same is not None:
                results.append(tensors[out.same])
            elif out.view is not None:
                base = tensors[out.view]
                assert isinstance(base, DeviceTensor)
                offset = out.offset
                if not what.absolute:
                    offset += base.storage_offset()
                results.append(
                    DeviceTensor.of(self, base.handle, out.size, out.stride, offset, out.dtype)
                )
            else:
                new.append(self._new(out.size, out.stride, out.dtype, name))
                results.append(new[-1])
        if (new and not what.empty) or written:
            uses = [(tensor, any(tensor is w for w in written)) for tensor in devices]
            if what.planned:
                self._plan(what, devices, kwargs)
            form = tuple((tuple(tensor.shape), tensor.dtype) for tensor in devices)
            self._run(name, (name, *form), uses + [(tensor, True) for tensor in new])
            first = next((t.memory.value for t, write in uses if not write), 0)
            value = what.value(args, first)
            for tensor in (*new, *(tensor for tensor, write in uses if write)):
                tensor.memory.value = value
        if several:
            return results if what.returns_list else tuple(results)
        return results[0] if results else None

    def _new(self, size: Any, stride: Any, dtype: torch.dtype, what: str) -> DeviceTensor:
        """A tensor in memory of its own, on the current stream."""
        stream, graph = self.current_stream(), self.local.capture
        pool = self.local.pool or DEFAULT_POOL
        if graph is not None:
            if stream.capture is not graph:
                graph.invalidate(
                    Rule.OUTSIDE, f"{what} allocates on {stream} while {graph.origin} is captured"
                )
            pool = graph.pool()
        memory = self.allocator.allocate(
            extent(size, stride) * dtype.itemsize,
            stream,
            pool,
            None if graph is None else graph.state,
        )
        if graph is None:
            # Its memory may be another's, whose last work on this stream is still under way.
            number = stream.clock[stream.stream_id]
            everything = (0, max(1, memory.num_bytes))
            memory.uses.note(stream.stream_id, everything, True, number, f"{what} on {stream}")
        return DeviceTensor.of(self, Handle(memory, self.dead), size, stride, 0, dtype)

    def _run(self, name: str, form: Any, uses: list[tuple[DeviceTensor, bool]]) -> None:
        """Queue an operation on the current stream."""
        stream, graph = self.current_stream(), self.local.capture
        if graph is not None:
            if stream.capture is not graph:
                graph.invalidate(
                    Rule.OUTSIDE, f"{name} runs on {stream} while {graph.origin} is captured"
                )
            if graph.invalid is not None:
                raise CudaError("CUDA error: operation failed due to a previous error in capture")
            for tensor, _ in uses:
                memory = tensor.memory
                if memory.graph is not None and memory.graph.released:
                    graph.invalidate(Rule.RELEASED, f"{name} uses memory of a graph that is gone")
            graph.record(stream, form, [(t.memory, span(t), w) for t, w in uses], name)
            return
        if stream.capture is not None:
            stream.capture.invalidate(
                Rule.OUTSIDE, f"{name} of another thread on {stream}, which is captured"
            )
        number = self.begin(stream)
        stream.operations.append(form)
        what = f"{name} on {stream}"
        for tensor, write in uses:
            self.use(tensor.memory, stream, span(tensor), write, number, what)

    def _plan(self, what: Operation, devices: list[DeviceTensor], kwargs: dict[str, Any]) -> None:
        """Libraries build plans at the first call of a form, which no capture allows."""
        stream, graph = self.current_stream(), self.local.capture
        form = tuple((tuple(t.shape), t.stride(), t.dtype) for t in devices)
        flags = tuple((k, str(v)) for k, v in kwargs.items() if not isinstance(v, Tensor))
        backends: tuple[bool, ...] = ()
        if what.attention:
            cuda = torch.backends.cuda
            backends = (
                cuda.flash_sdp_enabled(),
                cuda.mem_efficient_sdp_enabled(),
                cuda.cudnn_sdp_enabled(),
                cuda.math_sdp_enabled(),
            )
        key = (threading.get_ident(), stream.stream_id, what.func, form, flags, backends)
        if key in self._plans:
            return
        if graph is not None:
            shapes = ", ".join(str(shape) for shape, _, _ in form)
            graph.invalidate(Rule.PLAN, f"{what.name} of {shapes} on {stream}")
        self._plans.add(key)

    # What goes between host and device.

    def _host_read(self, what: str) -> None:
        if (graph := self.local.capture) is not None:
            graph.invalidate(Rule.HOST_READ, f"{what} on {graph.origin}")
        self._waited(what, self.current_stream().clock)

    def _pageable(self, what: str) -> None:
        if (graph := self.local.capture) is not None:
            graph.invalidate(Rule.PAGEABLE, f"{what} on {graph.origin}")
        self._waited(what, self.current_stream().clock)

    def _number(self, tensor: DeviceTensor) -> float:
        value: float = tensor.memory.value
        return value if self.read is None else self.read(tensor, int(value))

    def _read(self, what: Operation, devices: list[DeviceTensor]) -> Any:
        self._run(what.name, (what.name,), [(tensor, False) for tensor in devices])
        self._host_read(what.name)
        number = self._number(devices[0])
        if what.packet in (aten.is_nonzero, aten.equal) or devices[0].dtype is torch.bool:
            return bool(number)
        return float(number) if devices[0].is_floating_point() else int(number)

    def _to(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        names = ("self", "device", "dtype", "non_blocking", "copy", "memory_format", "other")
        source, device, dtype, non_blocking, copy, memory_format, other = _bound(
            func, args, kwargs, *names
        )
        if other is not None:
            device, dtype = other.device, other.dtype
        device = source.device if device is None else torch.device(device)
        dtype = source.dtype if dtype is None else dtype
        if device.type == "cuda":
            device = CUDA
        same = device == source.device and dtype is source.dtype
        plain = memory_format in (None, torch.preserve_format) or (
            memory_format is not torch.preserve_format
            and source.is_contiguous(memory_format=memory_format)
        )
        if func.overloadpacket is aten.to and same and not copy and plain:
            return source
        form = {} if plain else {"memory_format": memory_format}
        (out,), _ = _SHAPES.outputs(aten._to_copy.default, (source,), {"dtype": dtype, **form})
        assert out is not None
        if device.type == "cpu":
            # torch pins what it makes for a copy that is not waited for.
            host = torch.empty_strided(out.size, out.stride, dtype=dtype)
            if non_blocking:
                host = self.pin(host)
            return self._copy(host, source, non_blocking)
        result = self._new(out.size, out.stride, dtype, func.__name__)
        return self._copy(result, source, non_blocking)

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool | None) -> Tensor:
        to_device, from_device = (isinstance(t, DeviceTensor) for t in (target, source))
        form: Any = ("copy", tuple(target.shape), target.dtype, tuple(source.shape), source.dtype)
        if to_device and from_device:
            self._run("copy", form, [(source, False), (target, True)])
            target.memory.value = source.memory.value
            return target
        host = source if to_device else target
        pinned = self.pinned(host)
        # Otherwise torch goes by a temporary copy in pageable memory.
        direct = target.shape == source.shape and host.is_contiguous()
        if to_device:
            direct = direct and target.dtype is source.dtype
        if pinned is None or not direct:
            kind = "a copy of pageable memory"
            if to_device:
                self._pageable(f"{kind} to the device")
                self._run("copy", form, [(target, True)])
                merge(self.host, self.current_stream().clock)
            else:
                self._run_read_back(form, source)
                self._host_read(f"{kind} to the host")
        else:
            self._pinned_copy(form, target, source, host, pinned, to_device)
            if not non_blocking:
                if (graph := self.local.capture) is not None:
                    graph.invalidate(Rule.HOST_READ, "a copy that is waited for")
                self._waited("a copy that is waited for", self.current_stream().clock)
        if to_device:
            target.memory.value = 0
        else:
            target.fill_(self._number(source))
        return target

    def _run_read_back(self, form: Any, source: DeviceTensor) -> None:
        if (graph := self.local.capture) is not None:
            graph.invalidate(Rule.HOST_READ, f"a copy to the host on {graph.origin}")
        self._run("copy", form, [(source, False)])

    def _pinned_copy(
        self, form: Any, target: Any, source: Any, host: Tensor, pinned: Memory, to_device: bool
    ) -> None:
        device = target if to_device else source
        stream = self.current_stream()
        self._run("copy", form, [(device, to_device)])
        what = f"a copy on {stream}"
        if stream.capture is not None:
            stream.capture.touched[pinned].setdefault((span(host), not to_device), what)
            return
        number = stream.clock[stream.stream_id]
        self.use(pinned, stream, span(host), not to_device, number, what)


def _pages(address: int, num_bytes: int) -> Span:
    return address // PAGE, -(-(address + num_bytes) // PAGE)


def _bound(func: Any, args: Any, kwargs: dict[str, Any], *names: str) -> list[Any]:
    """Arguments by name; None of those that are not given."""
    given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)}
    given |= kwargs
    return [given.get(name) for name in names]
