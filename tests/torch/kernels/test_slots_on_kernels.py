"""Adapters in slots on the kernels, in Triton's interpreter, against those beside the model."""

import torch

from krea2_srt.kernels.operations import TRITON
from krea2_srt.lora.slot_deltas import SlotDeltas
from krea2_srt.lora.slots import AdapterSlots
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.model.modulation import Modulation
from krea2_srt.runner.model_runner import Krea2Runner
from krea2_srt.runner.packing import ForwardBatch
from tests.comparisons import CPU, relative_error
from tests.torch.lora.slot_packs import RANK, begun, mixed, variety


@torch.inference_mode()
def test_a_mixed_pack(demo_model):
    runner = Krea2Runner.load(Krea2Checkpoint.from_folder(demo_model), CPU, torch.float32)
    dit = runner.dit
    for adapter in variety(dit):
        runner.adapters.add(adapter)
    batch = ForwardBatch.of(begun(runner, mixed()[1::2]))
    pack = runner.packs.get(batch.shapes)
    tokens = pack.place(pack.image_spans, batch.tokens)
    context = pack.place(pack.text_spans, batch.contexts)
    inputs = (tokens, context, pack, Modulation.stack(batch.modulations))
    expected = dit(*inputs, deltas=batch.deltas(pack))
    slots = AdapterSlots(dit, RANK)
    numbers, scales = batch.adapter_rows(slots.place(batch.adapters))
    numbers = torch.tensor(numbers, dtype=torch.int32)
    dit.operations = TRITON
    deltas = SlotDeltas(slots, TRITON, pack.rows.index, numbers, torch.tensor(scales))
    found = dit(*inputs, deltas=deltas)
    for start, end in pack.segments.spans:
        assert relative_error(found[start:end], expected[start:end]) <= 2e-5
