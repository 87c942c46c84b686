"""The DiT against Diffusers' on the same weights, float32."""

from pathlib import Path

import pytest
import torch

from krea2_srt.model.dit_files import load_dit
from krea2_srt.model.modulation import Modulation
from krea2_srt.model.pack import Segments
from krea2_srt.runner.packing import build_pack
from krea2_srt.runner.sequence_shape import SequenceShape
from tests.comparisons import CPU, relative_error

HIDDEN_STATES = (12, 64)
SHAPES = [  # (text tokens, rows, columns, timestep)
    (5, 16, 16, 1.0),
    (23, 8, 20, 0.7371),
    (507, 4, 4, 0.01),
    (1, 1, 1, 0.5),
    (64, 33, 7, 0.25),
]


@pytest.fixture(scope="module", params=["diffusers layout", "original file"])
def dit(request, demo_model: Path, original_file: Path):
    path = original_file if request.param == "original file" else demo_model / "transformer"
    return load_dit(path, CPU, torch.float32)


def inputs(shape, seed=0):
    text, rows, columns, _ = shape
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(rows * columns, 64, generator=generator)
    return image, 3 * torch.randn(text, *HIDDEN_STATES, generator=generator)


def theirs(pipeline, shape, image, hidden_states):
    text, rows, columns, t = shape
    position_ids = pipeline.prepare_position_ids(text, rows, columns, CPU)
    with torch.inference_mode():
        return pipeline.transformer(
            hidden_states=image[None],
            encoder_hidden_states=hidden_states[None],
            timestep=torch.tensor([t]),
            position_ids=position_ids,
            return_dict=False,
        )[0][0]


def fused(dit, hidden_states):
    return dit.fuse_text(hidden_states, Segments.of([len(hidden_states)], CPU))


@torch.inference_mode()
def ours(dit, shapes, data):
    pack = build_pack([SequenceShape(*s[:3]) for s in shapes], dit.config, CPU)
    context = pack.place(pack.text_spans, [fused(dit, hidden_states) for _, hidden_states in data])
    rows = Modulation.stack([dit.modulation(torch.tensor([s[3]])) for s in shapes])
    velocity = dit(pack.place(pack.image_spans, [i for i, _ in data]), context, pack, rows)
    return [velocity[start:end] for start, end in pack.image_spans]


@pytest.mark.parametrize("shape", SHAPES)
def test_velocity_equals_diffusers(dit, diffusers_pipeline, shape):
    image, hidden_states = inputs(shape)
    (velocity,) = ours(dit, [shape], [(image, hidden_states)])
    assert relative_error(velocity, theirs(diffusers_pipeline, shape, image, hidden_states)) <= 1e-5


def test_each_sequence_of_a_pack_equals_itself_alone(dit):
    data = [inputs(shape, seed) for seed, shape in enumerate(SHAPES)]
    packed = ours(dit, SHAPES, data)
    for shape, pair, velocity in zip(SHAPES, data, packed, strict=True):
        (alone,) = ours(dit, [shape], [pair])
        assert relative_error(velocity, alone) <= 1e-5


def test_the_order_in_a_pack_does_not_matter(dit):
    data = [inputs(shape, seed) for seed, shape in enumerate(SHAPES)]
    forward = ours(dit, SHAPES, data)
    backward = ours(dit, SHAPES[::-1], data[::-1])[::-1]
    for a, b in zip(forward, backward, strict=True):
        assert relative_error(a, b) <= 1e-5


def test_a_step_in_slices_equals_the_whole_step(dit):
    shape = SHAPES[1]
    image, hidden_states = inputs(shape)
    with torch.inference_mode():
        pack = build_pack([SequenceShape(*shape[:3])], dit.config, CPU)
        rows = dit.modulation(torch.tensor([shape[3]]))
        context = pack.place(pack.text_spans, [fused(dit, hidden_states)])
        image = pack.place(pack.image_spans, [image])
        whole = dit(image, context, pack, rows)
        x = dit.embed(image, context, pack)
        for blocks in (range(1), range(1, 3), range(3, 4)):
            x = dit.run_blocks(x, pack, rows, blocks)
        assert torch.equal(dit.finish(x, pack, rows), whole)


def test_forward_leaves_its_inputs_alone(dit):
    shape = SHAPES[0]
    image, hidden_states = inputs(shape)
    pack = build_pack([SequenceShape(*shape[:3])], dit.config, CPU)
    context = pack.place(pack.text_spans, [fused(dit, hidden_states)])
    image = pack.place(pack.image_spans, [image])
    before = image.clone(), context.clone()
    with torch.inference_mode():
        dit(image, context, pack, dit.modulation(torch.tensor([0.5])))
    assert torch.equal(image, before[0])
    assert torch.equal(context, before[1])


def test_modulation_of_a_schedule_is_that_of_its_timesteps(dit):
    with torch.inference_mode():
        table = dit.modulation(torch.tensor([1.0, 0.6, 0.2]))
        for row, t in enumerate((1.0, 0.6, 0.2)):
            single = dit.modulation(torch.tensor([t]))
            picked = table.row(row)
            for name in ("scales", "shifts", "gates", "final_scale", "final_shift"):
                assert relative_error(getattr(picked, name), getattr(single, name)) <= 1e-6


def test_norms_and_tables_stay_float32_in_bf16(demo_model: Path):
    dit = load_dit(demo_model / "transformer", CPU, torch.bfloat16)
    dtypes = {name: p.dtype for name, p in dit.named_parameters()}
    assert dtypes["blocks.0.attn.qkvg.weight"] == torch.bfloat16
    assert dtypes["blocks.0.norm1.scale"] == torch.float32
    assert dtypes["blocks.0.attn.norm_q.scale"] == torch.float32
    assert dtypes["blocks.0.scale_shift_table"] == torch.float32
