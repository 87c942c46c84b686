"""Graphs of packs with adapters, without a GPU: with a recorder in place of CUDA's."""

import random
from dataclasses import replace
from weakref import ref

import pytest
import torch

from krea2_srt.kernels.operations import TORCH
from krea2_srt.lora.slots import AdapterSlots, slot_bytes
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.request import ImageRequest
from krea2_srt.runner.builder import RunnerBuilder
from krea2_srt.runner.config import RunnerConfig
from krea2_srt.runner.graphs import Eager, StepGraphs
from krea2_srt.runner.memory_sizes import GIB
from krea2_srt.runner.model_runner import Krea2Runner
from krea2_srt.runner.packing import ForwardBatch
from tests.comparisons import CPU, relative_error
from tests.torch.lora.slot_packs import (
    RANK,
    begun,
    few,
    finished,
    mixed,
    of_all,
    uses,
    variety,
)
from tests.torch.runner.device_products import device_expand, device_shrink
from tests.torch.runner.test_graphs import MAX_TOKENS, Captures, device_attention

BOUND = 2e-5
FIRST = ("all 16", "all 4", "all 9", "all 1", "all 13", "all 8", "all 2", "spanning", "few")
ON_THE_DEVICE = replace(TORCH, lora_shrink=device_shrink, lora_expand=device_expand)


@pytest.fixture(scope="module")
def loaded(demo_model) -> Krea2Runner:
    runner = Krea2Runner.load(Krea2Checkpoint.from_folder(demo_model), CPU, torch.float32)
    dit = runner.dit
    for adapter in (*variety(dit), of_all(dit, "wide", RANK + 1, 20), few(dit, "tenth", 21)):
        runner.adapters.add(adapter)
    return runner


@pytest.fixture
def captures() -> Captures:
    return Captures()


@pytest.fixture
def slots(loaded) -> AdapterSlots:
    return AdapterSlots(loaded.dit, RANK)


@pytest.fixture
def graphed(loaded, slots, captures, monkeypatch) -> StepGraphs:
    """Graphs of the runner, as long as a test lasts."""
    monkeypatch.setattr(loaded.dit, "operations", ON_THE_DEVICE)
    graphs = StepGraphs(loaded.dit, device_attention, captures, MAX_TOKENS, 16, adapter_slots=slots)
    monkeypatch.setattr(loaded, "graphs", graphs)
    return graphs


def eagerly(runner: Krea2Runner, images: list[ImageRequest]) -> list[torch.Tensor]:
    graphs, runner.graphs = runner.graphs, None
    try:
        return finished(runner, images)
    finally:
        runner.graphs = graphs


def close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(relative_error(got, wanted) <= BOUND for got, wanted in pairs)


ONE = ImageRequest("a cat", 64, 48, 3, seed=1)


def one(**scales: float) -> ImageRequest:
    return replace(ONE, adapters=uses(**scales))


def test_a_graph_serves_other_adapters_than_it_was_captured_with(loaded, graphed, captures):
    asked = [{"all_16": 1.0}, {"all_4": -0.5, "few": 2.0}, {"spanning": 1.0}, {"all_16": 0.3}]
    asked.append({"all_1": 1.0, "all_2": 0.5, "all_8": 0.7, "all_9": -1.0})
    asked.append({})
    expected = [eagerly(loaded, [one(**scales)]) for scales in asked]
    assert relative_error(expected[0][0], expected[3][0]) > 1e-3
    finished(loaded, [one(all_13=1.0)])
    assert graphed.record.eager[Eager.FIRST_USE] == ONE.steps
    for number, (scales, wanted) in enumerate(zip(asked, expected, strict=True)):
        if not scales:
            finished(loaded, [ONE])  # another graph, whose first picture this is
        assert close(finished(loaded, [one(**scales)]), wanted), scales
        assert captures.count == (2 if not scales else 1)
        assert graphed.record.replayed == (number + 1) * ONE.steps
    assert graphed.record.eager[Eager.ADAPTERS] == 0
    assert [key.adapters for key in graphed._graphs] == [True, False]


def test_mixed_packs_replay_what_they_are_eagerly(loaded, graphed, slots):
    expected = eagerly(loaded, mixed())
    for _ in range(2):
        found = finished(loaded, mixed())
    assert close(found, expected)
    assert graphed.record.replayed > 0
    assert graphed.record.eager[Eager.ADAPTERS] == 0
    assert slots.reloads == 0


def test_who_has_none_is_to_the_bit_what_it_is_among_others_without(loaded, graphed):
    images = mixed()[:2]
    assert [bool(image.adapters) for image in images] == [True, False]
    without = [replace(image, adapters=frozenset()) for image in images]
    for some in (images, without):
        finished(loaded, some)
    before = graphed.record.replayed
    found, expected = finished(loaded, images), finished(loaded, without)
    assert graphed.record.replayed - before == 8
    assert torch.equal(found[1], expected[1])
    assert relative_error(found[0], expected[0]) > 1e-3


def test_a_graph_without_adapters_launches_none_of_it(loaded, graphed, monkeypatch):
    def never(*_):
        raise AssertionError

    without = replace(ON_THE_DEVICE, lora_shrink=never, lora_expand=never)
    monkeypatch.setattr(loaded.dit, "operations", without)
    for _ in range(2):
        finished(loaded, [ONE])
    assert graphed.record.replayed == ONE.steps
    (key,) = graphed._graphs
    assert not key.adapters


def test_gate_and_up_are_no_fused_product_there(loaded, graphed, monkeypatch):
    expected = eagerly(loaded, mixed())
    fused = replace(ON_THE_DEVICE, fused_mlp_tokens=1)
    monkeypatch.setattr(loaded.dit, "operations", fused)
    for _ in range(2):
        found = finished(loaded, mixed())
    assert graphed.record.replayed > 0
    assert close(found, expected)


def test_a_whole_schedule_with_adapters_is_one_graph(loaded, graphed, captures):
    for number, scales in enumerate(({"all_16": 1.0}, {"all_4": 0.5, "few": 1.0}, {"few": 2.0})):
        (expected,) = eagerly(loaded, [one(**scales)])
        (state,) = begun(loaded, [one(**scales)])
        with torch.inference_mode():
            flags = loaded.graphs.step(
                (batch := ForwardBatch.of([state])), loaded.packs.get(batch.shapes), ONE.steps
            )
        assert (flags is None) == (number == 0)
        if number:
            assert state.done
            assert relative_error(state.tokens, expected) <= BOUND
    assert captures.count == 1


@pytest.mark.parametrize(
    "images",
    [
        [one(wide=1.0, few=0.5)],
        [
            replace(one(**{name.replace(" ", "_"): 0.5 for name in some}), seed=number)
            for number, some in enumerate((FIRST[:4], FIRST[4:8], FIRST[8:]))
        ],
    ],
    ids=["a rank above the slots'", "more than there are slots"],
)
def test_what_does_not_fit_into_slots_runs_eagerly(loaded, graphed, captures, slots, images):
    expected = eagerly(loaded, images)
    for _ in range(3):
        assert close(finished(loaded, images), expected)
    assert captures.count == slots.loads == 0
    assert graphed.record.eager[Eager.ADAPTERS] == 3 * ONE.steps
    (first, *_) = begun(loaded, images)
    if len(images) == 1:
        assert not loaded.prepare([first])


def test_without_slots_packs_with_adapters_run_eagerly(loaded, graphed, captures):
    graphed.adapter_slots = None
    for _ in range(2):
        finished(loaded, [one(few=1.0)])
    assert captures.count == 0
    assert graphed.record.eager[Eager.ADAPTERS] == 2 * ONE.steps


def test_random_packs_of_more_adapters_than_slots(loaded, graphed, slots):
    """Each image is as alone, whatever was in the slots; and they stay where they are."""
    random_ = random.Random(1)
    before = [m.down.data_ptr() for m in slots.matrices.values()]
    alone: dict[frozenset, torch.Tensor] = {}

    def image() -> ImageRequest:
        some = random_.sample(FIRST, random_.choice((0, 1, 2, 4, 4)))
        scales = {name.replace(" ", "_"): random_.choice((-0.5, 1.0)) for name in some}
        return replace(ONE, width=32, height=32, steps=2, adapters=uses(**scales))

    for _ in range(20):
        images = [image() for _ in range(random_.randint(1, 3))]
        if len({use.digest for one in images for use in one.adapters}) > 8:
            continue
        for each in images:
            if each.adapters not in alone:
                (alone[each.adapters],) = eagerly(loaded, [each])
        assert close(finished(loaded, images), [alone[each.adapters] for each in images])
    assert [m.down.data_ptr() for m in slots.matrices.values()] == before
    assert graphed.record.eager[Eager.ADAPTERS] == 0
    assert graphed.record.replayed > 10
    assert slots.reloads > 5


def test_prepared_graphs_serve_the_first_picture(loaded, graphed, captures):
    expected = eagerly(loaded, [one(all_9=1.0)])
    (state,) = begun(loaded, [one(few=1.0)])
    assert loaded.prepare([state])
    assert close(finished(loaded, [one(all_9=1.0)]), expected)
    assert captures.count == 1
    assert graphed.record.replayed == ONE.steps


def test_slots_go_with_the_graphs_and_come_back(loaded, graphed, captures, slots):
    expected = eagerly(loaded, [one(all_9=1.0)])
    for _ in range(2):
        finished(loaded, [one(all_9=1.0)])
    down = ref(next(iter(slots.matrices.values())).down)
    loaded.release_graphs()
    assert down() is None
    assert slots.nbytes == len(graphed) == 0
    assert close(finished(loaded, [one(all_9=1.0)]), expected)
    assert captures.count == 2
    assert slots.reloads == 1


def test_a_limit_keeps_what_is_in_the_slots(loaded, graphed, slots):
    for _ in range(2):
        finished(loaded, [one(few=1.0)])
    graphed.limit_to(400)
    assert slots.nbytes > 0
    expected = eagerly(loaded, [one(few=1.0)])
    assert close(finished(loaded, [one(few=1.0)]), expected)
    assert slots.loads == 1


def test_without_memory_for_released_slots_a_pack_runs_eagerly(
    loaded, graphed, captures, slots, monkeypatch
):
    def fails():
        raise torch.OutOfMemoryError("CUDA out of memory")

    expected = eagerly(loaded, [one(few=1.0)])
    finished(loaded, [one(few=1.0)])
    loaded.release_graphs()
    with monkeypatch.context() as patched:
        patched.setattr(slots, "_new_matrices", fails)
        assert close(finished(loaded, [one(few=1.0)]), expected)
        assert graphed.record.eager[Eager.FAILED] == ONE.steps
        (size,) = graphed.failures
        assert size.endswith(", with adapters")
    graphed.record.memory_freed()
    assert close(finished(loaded, [one(few=1.0)]), expected)
    assert captures.count == 1


def test_what_slots_have_done_is_published(loaded, graphed):
    finished(loaded, [one(few=1.0)])
    finished(loaded, [one(few=1.0)])
    found = loaded.graph_statistics()
    assert found["adapter_slot_bytes"] == 8 * slot_bytes(loaded.dit, RANK)
    assert (found["adapter_slot_loads"], found["adapter_slot_reloads"]) == (1, 0)


# Who decides that there are slots.


@pytest.mark.parametrize(
    ("config", "kernels", "rank"),
    [
        ({"lora_dir": "adapters"}, "triton", 128),
        ({"lora_dir": "adapters", "lora_memory_gib": 32}, "triton", 32),
        ({"lora_dir": "adapters", "lora_memory_gib": 15}, "triton", None),
        ({"lora_dir": "adapters"}, "torch", None),
        ({}, "triton", None),
    ],
)
def test_slots_are_as_large_as_the_settings_allow(
    loaded, demo_model, monkeypatch, caplog, config, kernels, rank
):
    """In the third and second row the memory is given as a rank: what its slots take."""
    caplog.set_level("INFO")
    if (of_rank := config.get("lora_memory_gib")) is not None:
        config = config | {"lora_memory_gib": 8 * slot_bytes(loaded.dit, of_rank) / GIB}
    monkeypatch.setattr(loaded.dit, "operations", replace(TORCH, name=kernels))
    checkpoint, dtype = Krea2Checkpoint.from_folder(demo_model), torch.float32
    config = RunnerConfig(**config)
    found = RunnerBuilder(checkpoint, CPU, dtype, dtype, dtype, config=config)._adapter_slots(
        loaded.dit
    )
    assert (found and found.rank) == rank
    if rank:
        assert f"CUDA graphs with adapters of ranks up to {rank}, 8 at a time" in caplog.text
    elif of_rank:
        assert "no CUDA graphs with adapters: lora_memory_gib is less than" in caplog.text
    else:
        assert caplog.text == ""


def test_slots_that_find_no_memory_are_done_without(loaded, demo_model, monkeypatch, caplog):
    def fails(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AdapterSlots, "_new_matrices", fails)
    monkeypatch.setattr(loaded.dit, "operations", replace(TORCH, name="triton"))
    checkpoint, dtype = Krea2Checkpoint.from_folder(demo_model), torch.float32
    config = RunnerConfig(lora_dir="adapters")
    builder = RunnerBuilder(checkpoint, CPU, dtype, dtype, dtype, config=config)
    assert builder._adapter_slots(loaded.dit) is None
    assert "no CUDA graphs with adapters: OutOfMemoryError: CUDA out of memory" in caplog.text
