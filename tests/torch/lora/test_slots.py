"""Slots: what is in them, who gets one, and that adapters in them are those beside the model."""

import random
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

from krea2_srt.kernels.quantize import quantize_tokens
from krea2_srt.lora.adapter import Adapter, Factor
from krea2_srt.lora.beside import PackDeltas
from krea2_srt.lora.placed import AdapterSet, PlacedAdapter
from krea2_srt.lora.pool import AdapterPool
from krea2_srt.lora.slot_deltas import SlotDeltas
from krea2_srt.lora.slots import (
    RANKS,
    AdapterSlots,
    largest_rank,
    slot_bytes,
    slotted_matrices,
)
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.model.dit_files import load_dit
from krea2_srt.model.modulation import Modulation
from krea2_srt.model.quantization import Quantization
from krea2_srt.runner.model_runner import Krea2Runner
from krea2_srt.runner.packing import ForwardBatch
from tests.comparisons import CPU, relative_error
from tests.torch.lora.slot_packs import RANK, Factors, begun, few, mixed, of_all, spanning, variety

BOUND = 2e-5


@pytest.fixture(scope="module")
def loaded(demo_model) -> Krea2Runner:
    runner = Krea2Runner.load(Krea2Checkpoint.from_folder(demo_model), CPU, torch.float32)
    for adapter in variety(runner.dit):
        runner.adapters.add(adapter)
    return runner


@pytest.fixture
def slots(loaded) -> AdapterSlots:
    return AdapterSlots(loaded.dit, RANK)


def placed(runner: Krea2Runner, adapter: Adapter) -> PlacedAdapter:
    return PlacedAdapter.on_host(runner.dit, adapter)


def by_digest(*adapters: PlacedAdapter) -> dict[str, PlacedAdapter]:
    return {adapter.digest: adapter for adapter in adapters}


def tensors(slots: AdapterSlots) -> Iterator[torch.Tensor]:
    for matrix in slots.matrices.values():
        yield from (matrix.down, matrix.up)


def addresses(slots: AdapterSlots) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors(slots)]


def deltas_of(slots: AdapterSlots, batch: ForwardBatch, index: torch.Tensor, do) -> SlotDeltas:
    numbers, scales = batch.adapter_rows(slots.place(batch.adapters))
    numbers = torch.tensor(numbers, dtype=torch.int32)
    return SlotDeltas(slots, do, index, numbers, torch.tensor(scales))


@torch.inference_mode()
def test_adapters_in_slots_are_those_beside_the_model(loaded, slots):
    batch = ForwardBatch.of(begun(loaded, mixed()))
    pack, dit = loaded.packs.get(batch.shapes), loaded.dit
    tokens = pack.place(pack.image_spans, batch.tokens)
    context = pack.place(pack.text_spans, batch.contexts)
    modulation = Modulation.stack(batch.modulations)
    in_slots = deltas_of(slots, batch, pack.rows.index, dit.operations)
    found, expected, base = (
        dit(tokens, context, pack, modulation, deltas=deltas)
        for deltas in (in_slots, batch.deltas(pack), None)
    )
    for number, ((start, end), state) in enumerate(
        zip(pack.segments.spans, batch.owners, strict=True)
    ):
        rows = slice(start, end)
        assert relative_error(found[rows], expected[rows]) <= BOUND, number
        if state.adapters:
            assert relative_error(found[rows], base[rows]) > 1e-3, number
        else:
            assert torch.equal(found[rows], base[rows]), number


@pytest.mark.parametrize("rotation", [False, True])
@torch.inference_mode()
def test_beside_a_base_in_8_bits(demo_model, rotation):
    dit = load_dit(demo_model / "transformer", CPU, torch.float32, Quantization("fp8", rotation))
    adapter = PlacedAdapter.on_host(dit, of_all(dit, "x", 12, 0))
    slots = AdapterSlots(dit, RANK)
    numbers = torch.tensor([[-1] * 4, [slots.place(by_digest(adapter))["x"], -1, -1, -1]])
    scales = torch.tensor([[0.0] * 4, [0.5, 0, 0, 0]])
    index = torch.tensor([0] * 7 + [1] * 9, dtype=torch.int32)
    in_slots = SlotDeltas(slots, dit.operations, index, numbers.int(), scales)
    beside = PackDeltas.of([(0, 7), (7, 16)], [AdapterSet(), AdapterSet.of((adapter, 0.5))])
    for linear in (dit.blocks[0].attn.qkvg, dit.blocks[1].ff.down):
        x = torch.randn(16, linear.weight.shape[1], generator=torch.Generator().manual_seed(0))
        x = quantize_tokens(x, linear.format)
        found, base = linear(x, in_slots), linear(x)
        assert torch.equal(found[:7], base[:7])
        assert relative_error(found - base, linear(x, beside) - base) <= BOUND


def test_nothing_is_left_of_what_was_in_a_slot(loaded, slots):
    adapters = [placed(loaded, adapter) for adapter in variety(loaded.dit)]
    before = addresses(slots)
    for first in adapters:
        for second in (adapters[0], adapters[-1], adapters[-2]):
            slots.load(3, first)
            slots.load(3, second)
            fresh = AdapterSlots(loaded.dit, RANK)
            fresh.load(3, second)
            assert all(map(torch.equal, tensors(slots), tensors(fresh)))
    assert addresses(slots) == before


def test_slots_hold_what_an_adapter_adds_to_each_matrix(loaded, slots):
    for adapter in (placed(loaded, a) for a in variety(loaded.dit)):
        slots.load(0, adapter)
        for linear, matrix in slots.matrices.items():
            expected = torch.zeros_like(linear.weight)
            for factor in adapter.factors.get(linear, ()):
                expected[factor.start : factor.stop] += factor.up @ factor.down
            starts = (*matrix.part_starts, len(expected))
            down = matrix.down[0].unflatten(0, (matrix.parts, RANK))
            found = [
                matrix.up[0, first:last] @ down[part]
                for part, (first, last) in enumerate(pairwise(starts))
            ]
            assert torch.allclose(torch.cat(found), expected, atol=1e-5)


def test_what_fits_is_the_sum_of_the_ranks_in_a_part(loaded, slots):
    dit, factors = loaded.dit, Factors(0)
    gate_up = dit.blocks[0].ff.gate_up
    gate, _ = gate_up.parts.values()

    def fits(*some: Factor) -> bool:
        return slots.fits(placed(loaded, Adapter("x", "x", {"blocks.0.ff.gate_up": some})))

    assert fits(*factors.of_parts(gate_up, RANK))
    assert not fits(*factors.of_parts(gate_up, RANK + 1))
    assert fits(factors.factor(gate_up, 9, 0, 5), factors.factor(gate_up, 7, 5, 20))
    assert not fits(factors.factor(gate_up, 9, 0, 5), factors.factor(gate_up, 8, 5, 20))
    assert fits(factors.factor(gate_up, 9, 0, gate), factors.factor(gate_up, 16, gate, gate + 1))
    assert not fits(factors.factor(gate_up, 9, 0, 5), factors.factor(gate_up, 8, 5, gate + 1))
    # Others are not in slots, whatever their rank.
    text = next(n for n, m in dit.named_modules() if n.startswith("text") and hasattr(m, "parts"))
    wide = factors.factor(dit.get_submodule(text), 40)
    assert slots.fits(placed(loaded, Adapter("x", "x", {text: (wide,)})))


def test_the_least_recently_used_makes_room_and_never_one_of_the_pack(loaded):
    slots = AdapterSlots(loaded.dit, RANK, num_slots=3)
    a, b, c, d = (placed(loaded, few(loaded.dit, name)) for name in "abcd")
    assert sorted(slots.place(by_digest(a, b, c)).values()) == [0, 1, 2]
    places = slots.place(by_digest(a, b, c))
    slots.place(by_digest(a))
    assert (slots.loads, slots.reloads) == (3, 0)
    assert slots.place(by_digest(d, c)) == {"c": places["c"], "d": places["b"]}
    assert slots.place(by_digest(b)) == {"b": places["a"]}
    assert (slots.loads, slots.reloads) == (5, 1)
    assert slots.fit(by_digest(a, b, c))
    assert not slots.fit(by_digest(a, b, c, d))


def test_the_same_adapter_copied_anew_has_its_slot(loaded, slots):
    """It is known by its digest: from the device it may go and come back."""
    pool = AdapterPool(loaded.dit)
    slots.place(by_digest(pool.add(spanning(loaded.dit))))
    pool.drop("spanning")
    slots.place(by_digest(pool.add(spanning(loaded.dit))))
    assert slots.loads == 1


def test_a_copy_that_fails_leaves_its_slot_free(loaded, slots, monkeypatch):
    a, b = (placed(loaded, few(loaded.dit, name)) for name in "ab")
    with monkeypatch.context() as patched:
        patched.setattr(torch, "_foreach_copy_", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            slots.place(by_digest(a))
    places = slots.place(by_digest(a, b))
    assert places["a"] != places["b"]
    assert slots.matrices[loaded.dit.blocks[1].attn.out].up[places["a"]].any()


def test_released_slots_are_made_anew(loaded, slots):
    adapter = placed(loaded, few(loaded.dit))
    nbytes = slots.nbytes
    assert nbytes == 8 * slot_bytes(loaded.dit, RANK)
    slots.place(by_digest(adapter))
    slots.release()
    assert slots.nbytes == 0
    number = slots.place(by_digest(adapter))["few"]
    assert slots.matrices[loaded.dit.blocks[1].attn.out].up[number].any()
    assert (slots.loads, slots.reloads, slots.nbytes) == (2, 1, nbytes)


def test_the_rank_is_the_largest_that_fits_into_the_memory(loaded):
    dit = loaded.dit
    for rank in RANKS:
        needed = 5 * slot_bytes(dit, rank)
        assert largest_rank(dit, 5, needed) == rank
        assert largest_rank(dit, 5, needed - 1) == (rank // 2 if rank > RANKS[0] else None)


def test_each_matrix_of_a_step_has_slots(loaded):
    """All that are not in the prompt's or the schedule's part."""
    slotted = set(slotted_matrices(loaded.dit))
    names = {name for name, m in loaded.dit.named_modules() if m in slotted}
    assert len(names) == 2 + 4 * len(loaded.dit.blocks)
    others = {name for name, m in loaded.dit.named_modules() if hasattr(m, "parts")} - names
    assert all(name.startswith(("text_fusion", "time_")) for name in others)


def test_random_packs_have_their_adapters(loaded, slots):
    """Whatever came before: nine adapters on eight slots, and never at another address."""
    adapters = [placed(loaded, adapter) for adapter in variety(loaded.dit)]
    random_, before = random.Random(0), addresses(slots)
    fresh = AdapterSlots(loaded.dit, RANK, num_slots=len(adapters))
    expected = fresh.place(by_digest(*adapters))
    for _ in range(60):
        some = random_.sample(adapters, random_.randint(1, 8))
        places = slots.place(by_digest(*some))
        assert len(set(places.values())) == len(some)
        for digest, slot in places.items():
            for got, wanted in zip(tensors(slots), tensors(fresh), strict=True):
                assert torch.equal(got[slot], wanted[expected[digest]])
    assert addresses(slots) == before
    assert slots.loads - slots.reloads == len(adapters)
    assert slots.reloads > 10
