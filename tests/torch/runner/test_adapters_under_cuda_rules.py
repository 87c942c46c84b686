"""Packs with adapters on graphs, held to CUDA's rules: see `test_under_cuda_rules`."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from krea2_srt.engine.lifecycle import State
from krea2_srt.lora.adapter import Adapter
from krea2_srt.lora.slots import AdapterSlots
from krea2_srt.model.quantization import Quantization
from krea2_srt.request import AdapterUse
from krea2_srt.runner.executor import RunnerExecutor
from krea2_srt.runner.graphs import CudaCapture
from krea2_srt.runner.model_runner import STREAM_PRIORITY, Krea2Runner
from tests.torch.cuda_rules import Machine, cuda_rules
from tests.torch.cuda_rules.models import small_runner
from tests.torch.cuda_rules.tensors import CUDA
from tests.torch.lora.slot_packs import RANK, Factors
from tests.torch.runner.test_under_cuda_rules import (
    MAX_GRAPH_TOKENS,
    executor_of,
    generated,
)

KERNELS = ("_shrink_kernel", "_expand_kernel")


@pytest.fixture
def cuda() -> Iterator[Machine]:
    with cuda_rules() as machine, torch.inference_mode():
        yield machine


@pytest.fixture
def launches(cuda, monkeypatch) -> Counter[str]:
    """Launches of Triton's kernels by the host, captured ones too."""
    found: Counter[str] = Counter()
    launch = cuda.launch

    def counted(kernel, args, kwargs):
        found[kernel.__name__] += 1
        launch(kernel, args, kwargs)

    monkeypatch.setattr(cuda, "launch", counted)
    return found


def adapted(runner: Krea2Runner, count: int = 10, num_slots: int = 2) -> list[frozenset]:
    """Graphs with slots, and adapters of the blocks, each in a set of its own; the last one has a
    rank above that of the slots.
    """
    found, dit = [], runner.dit
    for number in range(count):
        factors, block = Factors(number), dit.blocks[number % 2]
        rank = RANK + 1 if number == count - 1 else 3
        name = f"{number}"
        matrices = {
            f"blocks.{number % 2}.attn.qkvg": factors.of_parts(block.attn.qkvg, rank),
            f"blocks.{number % 2}.ff.down": factors.of_parts(block.ff.down, rank),
            "img_in": factors.of_parts(dit.img_in, rank),
            "final_linear": factors.of_parts(dit.final_linear, rank),
        }
        runner.adapters.add(Adapter(name, name, matrices))
        found.append(frozenset({AdapterUse(name, name, 0.5)}))
    runner.use_graphs(
        CudaCapture(CUDA, STREAM_PRIORITY),
        MAX_GRAPH_TOKENS,
        adapter_slots=AdapterSlots(dit, RANK, num_slots),
    )
    return found


@pytest.mark.parametrize(
    "quantization",
    [
        None,
        Quantization("fp8"),
        Quantization("fp8", rotation=True),
        Quantization("int8", rotation=True),
    ],
    ids=["bf16", "fp8", "fp8 rotated", "int8 rotated"],
)
def test_packs_with_adapters_are_replayed(cuda, launches, quantization):
    runner = small_runner(quantization)
    sets = adapted(runner)
    executor = executor_of(runner)
    for number, adapters in enumerate(sets[:4]):
        assert generated(executor, "a cat", steps=1, seed=number, adapters=adapters) is State.DONE
        matrices = 2 + 4 * len(runner.dit.blocks)
        # The first image runs eagerly; with the second the graph is captured, after a run of it.
        once = 0 if number == 0 else 2 * matrices
        assert [launches[kernel] for kernel in KERNELS] == [once, once]
    found = executor.statistics()
    assert found["graph_failures"] == {}
    assert found["graph_replays"] == 3
    assert found["graph_misses_adapters"] == 0
    assert found["graph_misses_first_use"] == 1
    assert found["adapter_slot_loads"] == 3


def test_without_adapters_none_of_it_is_launched(cuda, launches):
    runner = small_runner()
    sets = adapted(runner)
    executor = executor_of(runner)
    for _ in range(3):
        generated(executor, "a cat", steps=1)
    assert runner.graphs.record.replayed == 2
    for _ in range(2):
        generated(executor, "a cat", steps=1, adapters=sets[-1])  # of too high a rank
    assert executor.statistics()["graph_misses_adapters"] == 2
    assert not any(launches[kernel] for kernel in KERNELS)


def test_two_images_and_whole_schedules(cuda):
    runner = small_runner()
    sets = adapted(runner)
    executor = executor_of(runner, overlapped=False)
    for number in range(6):
        fields = {"steps": 3, "seed": number, "adapters": sets[number]}
        assert generated(executor, "a dog", num_images=2, **fields) is State.DONE
        assert generated(executor, "a dog", **fields) is State.DONE
    found = executor.statistics()
    assert found["graph_failures"] == {}
    assert found["graph_misses_adapters"] == 0
    assert any(key.adapters for key in runner.graphs._graphs)
    assert found["adapter_slot_reloads"] == 0


def test_slots_go_in_sleep_and_come_back(cuda):
    runner = small_runner()
    sets = adapted(runner)
    executor: RunnerExecutor = executor_of(runner)
    for _ in range(2):
        for number in range(3):
            generated(executor, "a cat", steps=1, adapters=sets[number])
        held = torch.cuda.memory_allocated()
        nbytes = runner.graphs.adapter_slots.nbytes
        assert nbytes > 0
        executor.release_memory()
        torch.cuda.synchronize()
        assert runner.graphs.adapter_slots.nbytes == 0
        assert torch.cuda.memory_allocated() <= held - nbytes
    assert executor.statistics()["graph_failures"] == {}


def test_memory_may_run_out_at_any_allocation(cuda):
    """Those of the slots too, which were given back: the pack then runs without a graph, or one
    request fails.
    """
    runner = small_runner()
    sets = adapted(runner)
    executor = executor_of(runner)
    for _ in range(2):
        generated(executor, "a cat", steps=1, adapters=sets[0])
    failed, without_graph = 0, 0
    for number in range(1, 10_000, 3):
        runner.release_graphs()
        before = cuda.allocator.out_of_memory, runner.graphs.record.replayed
        cuda.fail_allocations(number)
        state = generated(executor, "a cat", steps=1, seed=number, adapters=sets[number % 3])
        cuda.allocator.fail_at.clear()
        failed += state is State.FAILED
        if state is State.DONE and runner.graphs.record.replayed == before[1]:
            without_graph += 1
        if cuda.allocator.out_of_memory == before[0]:
            break
        assert generated(executor, "a cat", steps=1, adapters=sets[1]) is State.DONE
    assert failed > 3
    assert without_graph > 3
    assert cuda.allocator.recording == []
    replayed = runner.graphs.record.replayed
    assert generated(executor, "a cat", steps=1, adapters=sets[2]) is State.DONE
    assert runner.graphs.record.replayed == replayed + 1
    assert runner.graphs.record.failures == {}
