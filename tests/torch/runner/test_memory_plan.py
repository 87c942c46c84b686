"""What is decided on GPUs as they were found, and what holds on any."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3VLTextConfig, Qwen3VLTextModel

from krea2_srt.errors import ConfigError
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.quantization import Quantization
from krea2_srt.model.vae import VAEDecoder
from krea2_srt.model.vae_config import VAEConfig
from krea2_srt.runner.attention import SDPA, AttentionBackend, AttentionChoice
from krea2_srt.runner.gpu import Gpu
from krea2_srt.runner.graphs import StepBuffers
from krea2_srt.runner.memory_choices import FEWEST_SEQUENCES, IMAGE_TOKENS, MemoryRequest
from krea2_srt.runner.memory_plan import plan_memory
from krea2_srt.runner.memory_sizes import GIB, GRAPH_BYTES, PartSizes
from krea2_srt.runner.part_sizes import checkpoint_sizes, on_gpu, part_sizes
from krea2_srt.runner.prompt_encoder import PromptEncoder
from tests.comparisons import CPU
from tests.torch.runner.test_graphs import device_attention

CUDA = torch.device("cuda", 0)
DEVICES = {  # name: (total, free) in GiB, as an idle one tells
    "H200": (139.8, 139.2),
    "H100": (79.2, 78.6),
    "L40S": (44.4, 44.0),
    "A6000": (47.5, 47.0),
    "RTX 4090": (23.6, 23.1),
    "RTX 5090": (31.4, 30.9),
    "L4": (22.0, 21.7),
}
REQUEST = MemoryRequest(max_pack_tokens=33792)
FULL = (True, 33792, 16384, 2, 16896)


def released(quantization: Quantization | None):
    """The released model's parts, without their memory."""
    text = Qwen3VLTextConfig(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=35,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    )
    vae = VAEConfig(96, 16, (1, 2, 4, 4), 2, (False, True, True), (0.0,) * 16, (1.0,) * 16)
    with torch.device("meta"):
        return part_sizes(
            Krea2DiT(Krea2Config(), torch.bfloat16, quantization),
            Qwen3VLTextModel(text).to(torch.bfloat16),
            VAEDecoder(vae, torch.bfloat16),
            1024,
            scores=1,
        )


def on(total: float, sizes: PartSizes) -> PartSizes:
    """The same on a GPU of so many GiB: Hopper from 79 on."""
    return on_gpu(sizes, Gpu(0, int(total * GIB), (9, 0) if total > 79 else (8, 9)))


BF16, FP8 = released(None), released(Quantization("fp8"))


def plan(device: str, sizes=BF16, request=REQUEST):
    total, free = (int(x * GIB) for x in DEVICES[device])
    return plan_memory(free, total, on(DEVICES[device][0], sizes), request)


def decided(plan):
    return (
        plan.text_encoder_resident,
        plan.max_pack_tokens,
        plan.max_image_tokens,
        plan.overlapped_decodes,
        plan.max_graph_tokens,
    )


def test_the_released_model_is_as_large_as_is_said_of_it():
    parameters = (BF16.dit / 2) / 1e9
    assert 12.8 < parameters < 13.0
    # A byte for each weight of the blocks, and a scale for each of their rows.
    assert 0.52 < FP8.dit / BF16.dit < 0.56
    assert 7.8e9 < BF16.text_encoder < 7.9e9
    assert BF16.text_encoder_unit == 151936 * 2560 * 2
    assert BF16.vae < 0.2e9


@pytest.mark.parametrize("device", ["H200", "H100"])
@pytest.mark.parametrize("sizes", [BF16, FP8], ids=["bf16", "fp8"])
def test_large_gpus_have_room_for_everything(device, sizes):
    assert decided(plan(device, sizes)) == FULL


def test_48_gib_hold_bf16_with_graphs_of_small_packs():
    assert decided(plan("A6000")) == (True, 33792, 16384, 2, 8704)
    resident, budget, image, _, graph_tokens = decided(plan("L40S"))
    assert (resident, image) == (True, 16384)
    assert budget >= 16384 + 512
    assert 0 < graph_tokens < 16896


def test_48_gib_hold_fp8_with_everything():
    assert decided(plan("A6000", FP8)) == FULL
    assert decided(plan("L40S", FP8))[:4] == FULL[:4]


IN_A_TURN = 5632
"""Tokens of the largest pack that is replayed where a step may take 200 ms, on an H200."""


@pytest.mark.parametrize(
    ("device", "sizes", "expected", "sequences"),
    [
        ("H200", BF16, (True, 33792, 16384, 2, IN_A_TURN), 256),
        ("H200", FP8, (True, 33792, 16384, 2, IN_A_TURN), 256),
        ("H100", BF16, (True, 33792, 16384, 2, IN_A_TURN), 256),
        ("H100", FP8, (True, 33792, 16384, 2, IN_A_TURN), 256),
        ("A6000", BF16, (True, 33792, 16384, 2, IN_A_TURN), 128),
        ("A6000", FP8, (True, 33792, 16384, 2, IN_A_TURN), 256),
        ("L40S", BF16, (True, 33792, 16384, 1, 4608), 16),
        ("L40S", FP8, (True, 33792, 16384, 2, IN_A_TURN), 256),
        ("RTX 5090", FP8, (True, 33792, 16384, 1, 1536), 64),
        ("RTX 4090", FP8, (False, 33792, 16384, 2, 1536), 32),
        ("L4", FP8, (False, 33792, 16384, 1, 1536), 32),
    ],
)
def test_what_is_served_where(device, sizes, expected, sequences):
    """What docs/gpu.md promises of each size of GPU."""
    found = plan(device, sizes, replace(REQUEST, max_graph_tokens=IN_A_TURN))
    assert decided(found) == expected
    assert found.max_sequences == sequences


def test_32_gib_hold_bf16_with_the_encoder_offloaded_and_small_caches():
    found = plan("RTX 5090")
    assert decided(found)[2:] == (16384, 1, 0)
    assert not found.text_encoder_resident
    assert found.max_pack_tokens >= 16384 + 512
    assert not found.streamed_blocks
    assert "caches of more than 256 MiB" in found.given_up


def test_nothing_is_kept_for_packs_that_are_never_replayed():
    large, small = (plan("H200", request=replace(REQUEST, max_graph_tokens=n)) for n in (0, 5632))
    assert large.max_graph_tokens == 16896
    assert small.max_graph_tokens == 5632
    kept = {what: size for what, size, _ in small.rows}["CUDA graphs"]
    pools = BF16.step_per_token * 5632 + BF16.encode_graph
    buffers = BF16.graph_buffers + BF16.graph_per_token * 5632
    assert kept == pools + buffers + small.max_graphs * GRAPH_BYTES
    saved = {what: size for what, size, _ in large.rows}["CUDA graphs"] - kept
    assert saved >= (16896 - 5632) * BF16.step_per_token


def test_fewer_sequences_begin_where_there_is_little_room():
    """Before anything else is given up: most of the time far fewer have begun."""
    counts = [plan(device, FP8).max_sequences for device in ("H100", "RTX 5090", "L4")]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 256
    assert counts[-1] >= FEWEST_SEQUENCES
    assert plan("L4", FP8, replace(REQUEST, max_sequences=5)).max_sequences == 5


@pytest.mark.parametrize("device", ["RTX 4090", "L4"])
def test_24_gib_hold_bf16_with_some_blocks_on_the_host_and_the_plan_says_what_that_costs(device):
    found = plan(device)
    assert 0 < found.streamed_blocks < 14
    assert decided(found)[2:] == (16384, 1, 0)
    uploads = found.streamed_bytes / GIB
    assert uploads == pytest.approx(found.streamed_blocks * max(BF16.blocks) / GIB)
    assert (
        f"the places of {found.streamed_blocks} of 28 blocks: {uploads:.1f} GiB come from host "
        "memory in each step, which --quantization int8 would avoid"
    ) in found.given_up
    assert f"given up: {found.given_up[0]}" in found.report()


def test_what_is_asked_for_is_kept_or_refused():
    asked = MemoryRequest(33792, text_encoder="offload")
    assert not plan("H100", request=asked).text_encoder_resident
    assert not plan("H100", request=MemoryRequest(33792, graphs=False)).max_graph_tokens
    assert (
        plan("H100", request=MemoryRequest(33792, max_graph_tokens=2048)).max_graph_tokens == 2048
    )
    assert plan("H100", request=MemoryRequest(1000, max_image_tokens=1024)).max_pack_tokens == 1000
    resident = MemoryRequest(33792, text_encoder="resident")
    found = plan("RTX 4090", FP8, resident)
    assert found.text_encoder_resident
    assert found.streamed_blocks
    with pytest.raises(ConfigError, match="text_encoder auto") as refused:
        plan_memory(11 * GIB, 12 * GIB, FP8, resident)
    assert "int8" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"least 2\d\.\d are needed; --quantization int8 halves"):
        plan("RTX 4090", BF16, MemoryRequest(33792, streamed_blocks=0))


def test_the_table_lists_all_that_is_planned():
    found = plan("RTX 4090", FP8)
    lines = found.table().splitlines()
    assert len(lines) == len(found.rows) + 1
    sizes = [float(line.split(" GiB")[0].split()[-1]) for line in lines]
    assert sum(sizes) == pytest.approx(found.free / GIB, abs=0.05)
    assert "offloaded" in found.table()
    assert f"packs up to {found.max_pack_tokens} tokens" in found.table()


def test_adapters_beside_the_model_have_a_row_and_take_from_the_rest():
    without = plan("L40S", FP8)
    found = plan("L40S", FP8, replace(REQUEST, adapter_bytes=2 * GIB))
    assert ("adapters", 2 * GIB, "beside the model") in found.rows
    assert not [row for row in without.rows if row[0] == "adapters"]
    assert found.planned <= found.free
    with pytest.raises(ConfigError, match="a smaller lora_memory_gib leaves more to the model"):
        plan("RTX 4090", FP8, replace(REQUEST, adapter_bytes=20 * GIB))


@given(st.floats(1, 160), st.floats(0.5, 1), st.sampled_from([BF16, FP8]))
def test_a_plan_never_takes_more_than_is_free(total, share, sizes):
    free = int(total * share * GIB)
    try:
        found = plan_memory(free, int(total * GIB), sizes, REQUEST)
    except ConfigError:
        return
    assert found.planned <= free
    assert found.max_pack_tokens >= found.max_image_tokens + 512 or (
        found.max_pack_tokens == REQUEST.max_pack_tokens
    )


@given(st.floats(15, 160), st.floats(0, 40), st.sampled_from([BF16, FP8]))
def test_more_memory_is_never_worse(free, more, sizes):
    def rank(gib):
        try:
            found = plan_memory(int(gib * GIB), 160 * GIB, sizes, REQUEST)
        except ConfigError:
            return (0,)
        whole = found.max_pack_tokens == REQUEST.max_pack_tokens
        return (
            found.max_image_tokens,
            found.text_encoder_resident,
            found.max_graph_tokens > 0,
            whole,
            found.overlapped_decodes,
            found.max_graph_tokens,
        )

    assert rank(free) <= rank(free + more)


def test_images_give_way_last():
    """After all of the blocks."""
    plans = []
    for gib in range(8, 40):
        try:
            plans.append(plan_memory(gib * GIB // 4, 8 * GIB, FP8, REQUEST))
        except ConfigError:
            assert not plans
    assert plans[0].max_image_tokens in IMAGE_TOKENS[1:]
    assert all(p.streamed_blocks >= 26 for p in plans if p.max_image_tokens < IMAGE_TOKENS[0])
    assert plans[-1].max_image_tokens == IMAGE_TOKENS[0]


def test_a_checkpoints_sizes_are_those_of_its_loaded_parts(demo_model, runner):
    checkpoint = Krea2Checkpoint.from_folder(demo_model)
    float32 = torch.float32
    found = checkpoint_sizes(checkpoint, float32, float32, float32, None)
    assert found == part_sizes(runner.dit, runner.text_encoder.model, runner.vae, 1024)
    assert sum(found.blocks) < found.dit
    assert found.dit == sum(p.nbytes for p in runner.dit.parameters())


def test_graph_buffers_are_as_large_as_planned(runner, demo_model):
    on_device = AttentionChoice(SDPA, AttentionBackend("device", device_attention, True))
    config = runner.dit.config
    sizes = part_sizes(runner.dit, runner.text_encoder.model, runner.vae, 256)
    buffers = StepBuffers.empty(config, torch.float32, CPU, max_tokens=1000, max_rows=64)
    tensors = [t for t in vars(buffers).values() if isinstance(t, torch.Tensor)]
    actual = sum(t.nbytes for t in tensors) + buffers.modulation.nbytes
    encoder = PromptEncoder(runner.text_encoder, runner.dit, on_device)
    encoder.use_graphs(lambda function: function)
    actual += sum(t.nbytes for t in vars(encoder.graphs).values() if isinstance(t, torch.Tensor))
    assert actual == pytest.approx(sizes.graph_buffers + 1000 * sizes.graph_per_token, rel=0.01)


def test_the_demo_model_fits_anywhere(runner):
    sizes = part_sizes(runner.dit, runner.text_encoder.model, runner.vae, 256)
    found = plan_memory(8 * GIB, 8 * GIB, sizes, REQUEST)
    assert found.text_encoder_resident
    assert found.max_pack_tokens == REQUEST.max_pack_tokens
