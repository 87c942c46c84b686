"""A CUDA graph: what was captured, and what a replay reads and writes."""

import sys
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from tests.torch.cuda_rules.memory import Memory, PoolId, Span, Uses
from tests.torch.cuda_rules.rules import CudaError, Rule, RuleError
from tests.torch.cuda_rules.streams import Clock, Stream

if TYPE_CHECKING:
    from tests.torch.cuda_rules.machine import Machine


class Capture:
    """What outlives a graph: whether it is still there, asked by memory, streams and events.

    Attributes:
        graph: while it is captured.
        released: it was captured once, and is gone.
    """

    def __init__(self, graph: "Graph") -> None:
        self.graph: Graph | None = graph
        self.released = False


class Graph:
    """`torch.cuda.CUDAGraph`."""

    machine: "Machine"

    def __init__(self, keep_graph: bool = False) -> None:
        self._pool: PoolId | None = None
        self._ended = False
        self._forget()

    def _forget(self) -> None:
        self.capturing = False
        self.ready = False
        self.invalid: RuleError | None = None
        self.origin: Stream | None = None
        self.joined: list[tuple[Stream, Clock]] = []
        self.state = Capture(self)
        self.state.graph = None
        self.operations: list[Any] = []
        self.uses: dict[Memory, Uses] = defaultdict(Uses)
        self.touched: dict[Memory, dict[tuple[Span, bool], str]] = defaultdict(dict)
        self.before: list[Any] = []
        self.difference = ""

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global", **_: Any) -> None:
        machine = self.machine
        with machine.lock:
            machine.reap()
            if self._ended:
                raise CudaError("This CUDAGraph instance already owns a captured graph.")
            if capture_error_mode not in ("global", "thread_local", "relaxed"):
                raise CudaError(f"Unknown capture error mode {capture_error_mode}")
            stream = machine.current_stream()
            if stream is machine.default:
                machine.fail(Rule.OUTSIDE, "graphs must be captured on a non-default stream")
            if machine.local.capture is not None or stream.capture is not None:
                machine.fail(Rule.OUTSIDE, f"{stream} or its thread is being captured already")
            self._forget()
            pool = getattr(pool, "id", pool)
            self._pool = machine.graph_pool_handle() if pool is None else pool
            machine.allocator.begin(self._pool)
            self.capturing = True
            self.origin = stream
            self.before = list(stream.operations)
            self.state.graph = self
            stream.capture = machine.local.capture = self
            machine.captures.append(self)

    def join(self, stream: Stream) -> None:
        """A stream waits for captured work: it is captured too."""
        if stream.capture is None:
            stream.capture = self
            self.joined.append((stream, dict(stream.clock)))

    def invalidate(self, rule: Rule, text: str) -> None:
        """CUDA refuses something in a capture: all of it is lost.

        Raises:
            RuleError: always.
        """
        try:
            self.machine.fail(rule, text)
        except RuleError as error:
            self.invalid = error
            raise

    def capture_end(self) -> None:
        machine = self.machine
        with machine.lock:
            machine.reap()
            stream = machine.current_stream()
            if stream is not self.origin or not self.capturing:
                raise CudaError("Capture must end on the same stream it began on.")
            unjoined = []
            for joined, clock in self.joined:
                number = joined.clock[joined.stream_id]
                if stream.clock.get(joined.stream_id, 0) < number:
                    unjoined.append(joined)
                # What it has waited for in the capture, it has not waited for outside of it.
                joined.clock = clock | {joined.stream_id: number}
                joined.capture = None
            stream.capture = machine.local.capture = None
            machine.captures.remove(self)
            self.capturing = False
            self.state.graph = None
            # As torch's: it throws here, before the pool is closed and the capture counts as ended.
            if self.invalid is not None:
                raise CudaError(
                    "CUDA error: operation failed due to a previous error during capture"
                ) from self.invalid
            if unjoined:
                machine.fail(Rule.OUTSIDE, f"{unjoined} were not joined before the capture's end")
            assert self._pool is not None
            machine.allocator.end(self._pool)
            self._ended = self.ready = True
            self.difference = self._difference()
            if self.difference and sys.exc_info()[0] is None:
                machine.fail(Rule.DIFFERENT, self.difference)

    def _difference(self) -> str:
        """How the capture differs from every run of its stream before it; empty if it does not."""
        operations, before = self.operations, self.before
        self.before = []
        count = len(operations)
        if not count:
            return ""
        for start in range(len(before) - count, -1, -1):
            if before[start] == operations[0] and before[start : start + count] == operations:
                return ""
        tail = before[-count:]
        for place, (captured, warmed) in enumerate(zip(operations, tail, strict=False)):
            if captured != warmed:
                return f"operation {place} is {captured}, in the warm-up {warmed}"
        return f"{count} operations, {len(before)} in the warm-up"

    def replay(self) -> None:
        machine = self.machine
        with machine.lock:
            machine.reap()
            if not self.ready:
                machine.fail(Rule.RELEASED, "replay of a graph that was not captured, or was reset")
            if self.difference:
                machine.fail(Rule.DIFFERENT, self.difference)
            stream = machine.current_stream()
            if machine.local.capture is not None:
                self.invalidate(Rule.OUTSIDE, "replay of a graph in a capture")
            number = machine.begin(stream)
            assert self._pool is not None
            what = f"a replay on {stream}"
            memories = list(self.touched)
            for memory in memories:
                if memory.freed:
                    if memory.graph is not self.state:
                        uses = ", ".join(sorted(set(self.touched[memory].values())))
                        machine.fail(
                            Rule.INPUT, f"{memory.num_bytes} bytes that {uses} of the graph uses"
                        )
                    continue
                for (span, write), operation in self.touched[memory].items():
                    machine.use(memory, stream, span, write, number, f"{operation} in {what}")
            # Graphs of a pool share their scratch memory: only one may run at a time.
            shared = machine.pool_memory(self._pool)
            machine.use(shared, stream, (0, 1), True, number, what)

    def reset(self) -> None:
        machine = self.machine
        with machine.lock:
            if self._ended:
                assert self._pool is not None
                machine.allocator.release(self._pool)
                self._ended = False
            self._release()

    def _release(self) -> None:
        self.ready = False
        self.state.released = True
        self.touched.clear()

    def pool(self) -> PoolId:
        assert self._pool is not None
        return self._pool

    def record(
        self, stream: Stream, operation: Any, uses: list[tuple[Memory, Span, bool]], what: str
    ) -> None:
        """An operation in the capture: nothing runs."""
        stream.clock[stream.stream_id] += 1
        number = stream.clock[stream.stream_id]
        self.operations.append(operation)
        for memory, span, write in uses:
            if found := self.uses[memory].conflict(stream.clock, stream.stream_id, span, write):
                self.invalidate(Rule.RACE, f"{what} uses memory {found}")
            self.uses[memory].note(stream.stream_id, span, write, number, f"{what} in the capture")
            self.touched[memory].setdefault((span, write), what)

    def __del__(self) -> None:
        if self._ended and self._pool is not None and self.machine.open:
            self.reset()
        self._release()
