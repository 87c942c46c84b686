"""Blocks that come from host memory, held to CUDA's rules: see `test_under_cuda_rules`."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from weakref import ref

import pytest
import torch
from torch import Tensor

from krea2_srt.engine.engine import Engine
from krea2_srt.engine.lifecycle import State
from krea2_srt.errors import ConfigError
from krea2_srt.lora.adapter import Adapter
from krea2_srt.lora.placed import PlacedAdapter
from krea2_srt.lora.pool import AdapterPool
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.dit_files import load_dit
from krea2_srt.model.pinned_memory import pinned_bytes
from krea2_srt.model.quantization import Quantization
from krea2_srt.request import AdapterUse
from krea2_srt.runner import builder
from krea2_srt.runner.block_stream import BlockStream
from krea2_srt.runner.builder import RunnerBuilder
from krea2_srt.runner.config import RunnerConfig
from krea2_srt.runner.executor import RunnerExecutor
from krea2_srt.runner.model_runner import Krea2Runner
from krea2_srt.runner.upload_stream import CudaUploadStream, Moment
from tests.torch.cuda_rules import Machine, Rule, cuda_rules
from tests.torch.cuda_rules.models import small_runner
from tests.torch.cuda_rules.tensors import CUDA
from tests.torch.lora.slot_packs import Factors
from tests.torch.runner.test_under_cuda_rules import (
    CONFIG,
    COST,
    executor_of,
    fail_each_allocation,
    finish,
    generated,
    image,
    run,
    schedule,
    start,
)

BLOCKS = 5
KINDS = [None, Quantization("fp8"), Quantization("int8", rotation=True)]
names = ["bf16", "fp8", "int8"]


@pytest.fixture
def cuda() -> Iterator[Machine]:
    with cuda_rules() as machine, torch.inference_mode():
        yield machine


def streaming(*streamed: int, quantization: Quantization | None = None) -> Krea2Runner:
    return small_runner(quantization, BLOCKS, streamed)


class Log(CudaUploadStream):
    """Notes what is queued, by the number of the block."""

    def __init__(self, runner: Krea2Runner) -> None:
        super().__init__(CUDA)
        blocks = runner.dit.host_blocks.items()
        self._numbers = {block.memory.data_ptr(): number for number, block in blocks}
        self._moments: dict[int, int] = {}
        self.lines: list[tuple[str, int]] = []

    def upload(self, target: Tensor, source: Tensor, after: Moment | None) -> Moment:
        moment = super().upload(target, source, after)
        number = self._moments[id(moment)] = self._numbers[source.data_ptr()]
        self.lines.append(("upload", number))
        return moment

    def wait(self, moment: Moment) -> None:
        self.lines.append(("wait", self._moments[id(moment)]))
        super().wait(moment)


def logged(*streamed: int) -> tuple[Krea2Runner, Log]:
    runner = streaming(*streamed)
    log = Log(runner)
    runner.stream_blocks(log)
    return runner, log


# The order.


@pytest.mark.parametrize("streamed", [(1, 3), (0, 2, 4), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("sliced", [False, True])
def test_the_next_block_is_queued_before_a_block_is_waited_for(cuda, streamed, sliced):
    runner, log = logged(*streamed)
    executor, slices = executor_of(runner), []
    step = executor.step
    executor.step = lambda pack, blocks: slices.append(blocks) or step(pack, blocks)
    engine = Engine(executor, replace(COST, blocks=BLOCKS), CONFIG)
    engine.submit("a", [image(side=128 if sliced else 64, steps=3)])
    assert set(run(engine).values()) == {State.DONE}
    waits = [at for at, (what, _) in enumerate(log.lines) if what == "wait"]
    assert [log.lines[at][1] for at in waits] == [*streamed] * 3
    assert (len(slices) > 3) == sliced
    following = dict(zip(streamed, streamed[1:] + streamed[:1], strict=True))
    for at in waits:
        block = log.lines[at][1]
        uploads = [number for what, number in log.lines[:at] if what == "upload"]
        # Its own was queued last but one, or all of them fit into the two buffers.
        assert following[block] == uploads[-1] or len(streamed) == 2
    statistics = executor.statistics()
    assert statistics["streamed_blocks"] == len(streamed)
    assert statistics["streamed_block_uploads_late"] == 0
    # Once each step, and the first two of the next one.
    assert statistics["streamed_block_uploads"] == (
        2 if len(streamed) == 2 else 3 * len(streamed) + 2
    )


def test_the_host_never_waits_for_an_upload(cuda):
    runner = streaming(0, 2, 3)
    state = start(runner)
    with runner.on_stream():
        runner.launch([state])
        with cuda.no_waits():
            runner.launch([state])
            forward = runner.begin_step([state])
            forward.run(range(2))
            runner.launch([start_again(state)])
            forward.run(range(2, BLOCKS))


def start_again(state):
    return replace(state, sequence=replace(state.sequence))


def test_a_paused_step_costs_an_upload_that_is_waited_for_and_no_more(cuda):
    runner = streaming(0, 1, 2, 3, 4)
    stream = runner.block_stream
    one, other = start(runner), start(runner, "a dog")
    with runner.on_stream():
        forward = runner.begin_step([one])
        forward.run(range(3))
        assert (stream.uploads_queued, stream.late) == (5, 0)
        runner.launch([other])  # blocks 3 and 4 are at hand: 0 is late
        assert (stream.uploads_queued, stream.late) == (12, 1)
        forward.run(range(3, BLOCKS))  # 0 and 1 are: 3 is
        assert (stream.uploads_queued, stream.late) == (16, 2)
        forward.finish()


# What would go wrong without it.


class TooEarly(CudaUploadStream):
    """Overwrites a buffer while it is read."""

    def upload(self, target: Tensor, source: Tensor, after: Moment | None) -> Moment:
        return super().upload(target, source, None)


class NoWait(CudaUploadStream):
    """Reads a buffer before its upload is done."""

    def wait(self, moment: Moment) -> None:
        pass


@pytest.mark.parametrize("broken", [TooEarly, NoWait])
def test_the_rules_find_an_order_that_is_missing(cuda, broken):
    runner = streaming(0, 2, 4)
    state = start(runner)
    with cuda.breaks(Rule.RACE):
        runner.stream_blocks(broken(CUDA))
        runner.step([state])


def test_the_host_may_not_write_what_is_being_uploaded(cuda):
    runner = streaming(0, 2, 4)
    state = start(runner)
    with runner.on_stream():
        runner.launch([state])
    with cuda.breaks(Rule.PINNED):
        runner.dit.host_blocks[0].memory.zero_()
    torch.cuda.synchronize()
    runner.dit.host_blocks[0].memory.zero_()


# Pinned memory.


def test_as_much_is_pinned_as_the_blocks_take(cuda):
    runner = streaming(1, 3, quantization=Quantization("fp8"))
    blocks = runner.dit.host_blocks
    matrices = [m for block in blocks.values() for m in block.linears]
    assert all(m.weight.is_pinned() and m.scale.is_pinned() for m in matrices)
    least = sum(m.weight.nbytes + m.scale.nbytes for m in matrices)
    assert least <= sum(m.num_bytes for m in cuda.registered.values()) < least + 8 * 256


def test_pinned_memory_goes_after_its_uploads(cuda):
    runner = streaming(0, 2, 4)
    state = start(runner)
    with runner.on_stream():
        runner.launch([state])
    assert len(cuda.registered) == 3
    waits = len(cuda.waits)
    del runner, state
    assert len(cuda.registered) == 0
    assert len(cuda.waits) > waits


def test_memory_that_cannot_be_pinned_is_a_clear_error(cuda, monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "cudart", lambda: type("Runtime", (), {"cudaHostRegister": lambda *_: 2})
    )
    with pytest.raises(ConfigError, match=r"^host memory: 0\.50 GiB .*\(CUDA error 2\)"):
        pinned_bytes(2**29)


# The engine.


@pytest.mark.parametrize("quantization", KINDS, ids=names)
def test_requests_are_generated(cuda, quantization):
    executor = executor_of(streaming(0, 2, 3, quantization=quantization))
    engine = Engine(executor, replace(COST, blocks=BLOCKS), CONFIG)
    for number in range(3):
        engine.submit(f"{number}", [image(steps=1 + number)])
    engine.submit("large", [image(side=128, guidance=2.0, num_images=2)])
    assert set(run(engine).values()) == {State.DONE}


@pytest.mark.parametrize("seed", range(6))
def test_random_schedules(seed):
    schedule(seed, failing=seed % 2 == 0, streamed=[(0, 2, 4), (1, 3), (0, 1, 2, 3, 4)][seed % 3])


def test_any_allocation_may_run_out_of_memory(cuda):
    runner = streaming(0, 2, 4)
    assert fail_each_allocation(cuda, runner, every=9, steps=1) > 5


def test_a_block_that_fails_is_not_overwritten_while_it_is_read(cuda):
    runner = streaming(0, 2, 4)
    state = start(runner)
    with runner.on_stream():
        runner.launch([state])
        before = cuda.allocator.count
        runner.launch([state])
        count = cuda.allocator.count - before
        for number in (count // 4, count // 2, 3 * count // 4):
            cuda.fail_allocations(number)
            with pytest.raises(torch.OutOfMemoryError):
                runner.launch([state])
            linears = [m for block in runner.dit.host_blocks.values() for m in block.linears]
            assert all(linear.weight.device.type == "cpu" for linear in linears)
        finish(runner, [state])


# Memory.


def test_sleep_gives_the_buffers_back_and_leaves_the_host_alone(cuda):
    runner = streaming(0, 2, 4)
    executor = executor_of(runner)
    assert generated(executor, "a cat") is State.DONE
    state = start(runner)
    home = [block.memory.data_ptr() for block in runner.dit.host_blocks.values()]
    executor.release_memory()
    state.release()
    parts = (runner.dit, runner.text_encoder.model, runner.vae)
    for part in parts:
        part.to("cpu")
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() == 0
    for part in parts:
        part.to(CUDA)
    blocks = runner.dit.host_blocks.values()
    assert [block.memory.data_ptr() for block in blocks] == home
    assert all(linear.weight.is_pinned() for block in blocks for linear in block.linears)
    for _ in range(2):
        assert generated(executor, "a cat") is State.DONE


def test_steps_take_no_memory_for_good(cuda):
    runner = streaming(0, 2, 4)
    executor = executor_of(runner)
    for _ in range(2):
        assert generated(executor, "a cat") is State.DONE
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for number in range(3):
        assert generated(executor, "a cat", seed=number) is State.DONE
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("quantization", KINDS, ids=names)
def test_no_more_is_on_the_device_than_planned_not_even_while_it_loads(
    cuda, demo_model, quantization
):
    def load(on_host: tuple[int, ...]) -> Krea2DiT:
        path = demo_model / "transformer"
        return load_dit(path, CUDA, torch.bfloat16, quantization, on_host=on_host)

    dit = load(())
    block = sum(t.nbytes for linear in dit.blocks[0].linears for t in linear.parameters())
    most = max(linear.weight.numel() for linear in dit.blocks[0].linears)
    at_rest = torch.cuda.memory_allocated()
    del dit
    torch.cuda.reset_peak_memory_stats()
    dit = load((0, 2, 3))
    allocated = torch.cuda.memory_allocated()
    assert allocated == pytest.approx(at_rest - 3 * block, rel=0.01)
    # What one matrix takes while it is quantised there, with copies in float32.
    assert torch.cuda.max_memory_allocated() <= allocated + 4 * 4 * most
    stream = BlockStream(dit.host_blocks, CUDA, CudaUploadStream(CUDA))
    stream.prepare()
    assert torch.cuda.memory_allocated() == allocated + stream.buffer_bytes
    assert stream.buffer_bytes == pytest.approx(2 * block, rel=0.01)


def load(folder: Path, streamed: int, **fields) -> Krea2Runner:
    """As a server does, with so many blocks streamed."""
    checkpoint, dtype = Krea2Checkpoint.from_folder(folder), torch.bfloat16
    setup = RunnerBuilder(checkpoint, CUDA, dtype, dtype, dtype, **fields)
    return setup.load(replace(setup.plan(), streamed_blocks=streamed))


def test_no_graphs_where_a_block_is_streamed(cuda, demo_model, caplog):
    caplog.set_level("INFO")
    runner = load(demo_model, 2, config=RunnerConfig(warm_up_s=0))
    assert runner.all_graphs == []
    assert "no CUDA graphs: 2 of 4 blocks are streamed from host memory" in caplog.text
    executor = RunnerExecutor(runner)
    assert not executor.full_schedule_graphs
    assert executor.statistics()["streamed_blocks"] == 2
    with pytest.raises(ConfigError, match=r"^cuda_graphs: on needs all blocks on the GPU"):
        load(demo_model, 2, config=RunnerConfig(cuda_graphs="on"))


@pytest.mark.slow
def test_products_are_tried_where_all_blocks_are_streamed(cuda, demo_model, monkeypatch):
    tried = []
    monkeypatch.setattr(
        builder,
        "with_fused_mlp",
        lambda dit, setting: (
            tried.append([m.weight.device.type for m in dit.blocks[1].linears]) or dit.operations
        ),
    )
    use_fastest_product = builder.use_fastest_product
    monkeypatch.setattr(
        builder,
        "use_fastest_product",
        lambda dit, candidates: tried.append(use_fastest_product(dit, candidates)),
    )
    runner = load(
        demo_model,
        4,
        quantization=Quantization("fp8", keep=("0.*", "2.ff.*")),
        config=RunnerConfig(warm_up_s=0, products="torch"),
    )
    assert tried == ["torch", ["cuda"] * 4]
    assert len(runner.dit.host_blocks) == runner.num_blocks == 4
    assert generated(executor_of(runner), "a cat") is State.DONE


# Adapters.


@pytest.mark.parametrize("quantization", KINDS, ids=names)
def test_adapters_of_streamed_blocks_stay_in_pinned_memory(cuda, quantization):
    runner = streaming(0, 2, 4, quantization=quantization)
    matrices = {}
    for number, block in enumerate(runner.dit.blocks):
        for name in ("attn.qkvg", "ff.down"):
            linear = block.get_submodule(name)
            matrices[f"blocks.{number}.{name}"] = Factors(number).of_parts(linear, 3)
    adapter = Adapter("x", "x", matrices)
    placed = runner.adapters.add(adapter)
    for number, block in enumerate(runner.dit.blocks):
        for factor in placed.factors[block.attn.qkvg]:
            where = "cpu" if number in (0, 2, 4) else "cuda"
            assert factor.down.device.type == factor.up.device.type == where
            assert where == "cuda" or factor.up.is_pinned()
    host = runner.adapters.host_copy("x")
    assert placed.nbytes == pytest.approx(host.nbytes * 2 / 5)
    assert runner.adapters.on_device.nbytes == placed.nbytes
    runner.adapters.on_device.max_bytes = placed.nbytes
    assert runner.adapters.fit({"x"})
    state = start(runner)
    executor = executor_of(runner)
    adapters = frozenset({AdapterUse("x", "x", 0.5)})
    for number in range(2):
        assert (
            generated(executor, "a cat", seed=number, guidance=2.0, adapters=adapters) is State.DONE
        )
    del state


def test_the_hosts_memory_for_adapters_is_bounded_where_they_take_none_of_the_gpus(cuda):
    runner = streaming(*range(BLOCKS))
    linear = runner.dit.blocks[0].ff.down
    adapters = [
        Adapter(name, name, {"blocks.0.ff.down": Factors(seed).of_parts(linear, 3)})
        for seed, name in enumerate("abcd")
    ]
    size = PlacedAdapter.on_host(runner.dit, adapters[0]).nbytes
    pool = AdapterPool(runner.dit, max_host_bytes=2 * size)
    held = pool.add(adapters[0])
    there = [ref(pool.add(adapter).downs[linear]) for adapter in adapters]
    assert held.nbytes == 0
    # The one that is held stays beside the last one, and counts.
    assert [tensor() is not None for tensor in there] == [True, False, False, True]
    assert pool.on_host.nbytes == 2 * size
    del held
    pool.add(adapters[1])
    pool.add(adapters[2])
    assert [tensor() is not None for tensor in there] == [False] * 4
    assert [pool.where(name) for name in "abcd"] == ["disk", "device", "device", "disk"]
