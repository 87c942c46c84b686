"""Plans of the released model on known GPUs, and what holds of plans on any GPU and any host."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from krea2_srt.engine.config import EngineConfig
from krea2_srt.errors import ConfigError
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.quantization import SERVED
from krea2_srt.model.released import write_released_configs
from krea2_srt.runner.builder import RunnerBuilder
from krea2_srt.runner.config import RunnerConfig
from krea2_srt.runner.gpu import Gpu
from krea2_srt.runner.known_gpus import KNOWN_GPUS, known_gpu
from krea2_srt.runner.memory_choices import MemoryRequest
from krea2_srt.runner.memory_plan import plan_memory
from krea2_srt.runner.memory_sizes import GIB
from krea2_srt.runner.modelled_time import picture_time
from krea2_srt.runner.part_sizes import on_gpu
from krea2_srt.runner.streamed_blocks import BUFFERS

BF16 = torch.bfloat16
FORMATS = {"none": None, **SERVED}


@pytest.fixture(scope="module")
def builders(tmp_path_factory) -> dict[str, RunnerBuilder]:
    """One for each format, of the released configs."""
    folder = tmp_path_factory.mktemp("released")
    write_released_configs(folder, distilled=True)
    plain = RunnerBuilder(
        Krea2Checkpoint.from_folder(folder), torch.device("cuda"), BF16, BF16, BF16
    )
    return {name: replace(plain, quantization=q) for name, q in FORMATS.items()}


@pytest.fixture(scope="module")
def sizes(builders):
    return {name: builder.sizes() for name, builder in builders.items()}


EVERYTHING = (0, True, 13004, 2, 256)
RECORDED = {
    # (blocks streamed, encoder resident, tokens of the largest graph, decodes, images begun)
    # in bf16 and in 8 bits
    "3060": ((24, False, 0, 1, 8), (17, False, 0, 1, 8)),
    "3090": ((10, False, 0, 1, 16), (0, False, 1536, 2, 32)),
    "A10": ((12, False, 0, 1, 16), (0, False, 1536, 1, 32)),
    "A6000": ((0, True, 6502, 2, 128), EVERYTHING),
    "4070": ((24, False, 0, 1, 8), (17, False, 0, 1, 8)),
    "4080": ((20, False, 0, 1, 16), (8, False, 0, 1, 16)),
    "4090": ((10, False, 0, 1, 8), (0, False, 1536, 2, 32)),
    "L4": ((12, False, 0, 1, 16), (0, False, 1536, 1, 32)),
    "L40S": ((0, True, 1536, 1, 64), EVERYTHING),
    "5080": ((20, False, 0, 1, 16), (9, False, 0, 1, 16)),
    "5090": ((0, False, 0, 1, 16), (0, True, 1536, 1, 32)),
    "B200": ((0, True, 6502, 2, 256), EVERYTHING),
    "A100-40GB": ((0, False, 6502, 2, 128), EVERYTHING),
    "A100-80GB": ((0, True, 6502, 2, 256), EVERYTHING),
    "H100": ((0, True, 6502, 2, 256), EVERYTHING),
    "H200": ((0, True, 6502, 2, 256), EVERYTHING),
}

TIGHT = {"4070": (17, False, 0, 1, 4)}
"""In int8, where the 16 MiB of torch's sums are what is missing."""


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", [known.name for known in KNOWN_GPUS])
def test_what_is_given_up_where(builders, sizes, name, format):
    """What docs/gpu.md promises of each GPU: 2048x2048 on all of them."""
    known = known_gpu(name)
    if format == "fp8" and known.capability < (8, 9):
        with pytest.raises(ConfigError, match=r"^quantization: fp8 needs a GPU of compute"):
            builders[format].plan_for(known.gpu, sizes=sizes[format])
        return
    plan = builders[format].plan_for(known.gpu, sizes=sizes[format])
    assert plan.max_image_tokens == 16384
    assert plan.max_pack_tokens >= 16384 + 512
    assert plan.planned <= plan.free
    found = (
        plan.streamed_blocks,
        plan.text_encoder_resident,
        plan.max_graph_tokens,
        plan.overlapped_decodes,
        plan.max_sequences,
    )
    recorded = RECORDED[name][format != "none"]
    assert found == (TIGHT.get(name, recorded) if format == "int8" else recorded)
    # Uploads hide behind the steps of what most ask for.
    options = {"format": format if format != "none" else None, "steps": 8, "guided": False}
    time = picture_time(known, plan, Krea2Config(), **options)
    resident = replace(plan, streamed_blocks=0, streamed_bytes=0)
    assert time.step_ms(1024) == pytest.approx(
        picture_time(known, resident, Krea2Config(), **options).step_ms(1024)
    )


def test_streamed_blocks_leave_the_gpu_but_for_two_buffers(builders, sizes):
    plan = builders["int8"].plan_for(known_gpu("3060").gpu, sizes=sizes["int8"])
    part, block = sizes["int8"], sizes["int8"].blocks[0]
    assert set(part.blocks) == {block}
    rows = {what: (size, note) for what, size, note in plan.rows}
    kept = part.dit - (plan.streamed_blocks - BUFFERS) * block
    assert rows["transformer"] == (kept, "11 blocks resident, 17 streamed")
    assert plan.streamed_bytes == 17 * block
    assert plan.pinned_bytes == 17 * block + part.text_encoder
    assert f"{plan.pinned_bytes / GIB:.2f} GiB  pinned" in plan.report()
    # One block fewer, and all else as small as can be, would not fit.
    asked = replace(builders["int8"].config, streamed_blocks="16")
    fewer = replace(builders["int8"], config=asked)
    assert fewer.plan_for(known_gpu("3060").gpu, sizes=part).max_image_tokens < 16384


def test_a_plan_that_gives_up_nothing_says_nothing(builders, sizes):
    engine = EngineConfig(max_active_sequences=8)
    plan = replace(builders["int8"], engine=engine).plan_for(
        known_gpu("H200").gpu, sizes=sizes["int8"]
    )
    assert plan.given_up == ()
    assert plan.report() == plan.table()
    assert not plan.pinned_bytes


def test_the_engine_is_held_to_what_a_small_gpu_has(builders, sizes):
    builder = builders["int8"]
    plan = builder.plan_for(known_gpu("3060").gpu, sizes=sizes["int8"])
    within = builder.within(plan)
    assert within.max_active_sequences == within.max_pack_sequences == 8
    assert plan.max_encoded_prompts < 8
    assert any("prompts encoded at a time" in line for line in plan.given_up)
    # Prompts take no more than a step, which takes what a largest image needs.
    work = next(size for what, size, _ in plan.rows if what == "steps, encoding")
    assert sizes["int8"].encode(plan.max_encoded_prompts, resident=False) <= work


def test_adapters_count_only_where_requests_may_name_them(builders, sizes):
    def planned(name: str, **config):
        builder = replace(builders["int8"], config=RunnerConfig(**config))
        return builder.plan_for(known_gpu(name).gpu, sizes=sizes["int8"])

    without = planned("3060", lora_memory_gib=100.0)
    assert without == planned("3060")
    small = planned("3060", lora_dir="adapters")
    assert ("adapters", 2 * GIB, "beside the model") in small.rows
    assert small.streamed_blocks == without.streamed_blocks + 5
    # Slots of graphs are as large again, and there are no graphs of blocks that are streamed.
    assert ("adapters", 4 * GIB, "beside the model") in planned("H200", lora_dir="adapters").rows
    off = planned("H200", lora_dir="adapters", cuda_graphs="off")
    assert ("adapters", 2 * GIB, "beside the model") in off.rows


@pytest.mark.parametrize(("count", "graphs"), [("0", True), ("1", False), ("5", False)])
def test_as_many_blocks_are_streamed_as_are_asked_for(builders, sizes, count, graphs):
    builder = replace(builders["none"], config=RunnerConfig(streamed_blocks=count))
    plan = builder.plan_for(known_gpu("H200").gpu, sizes=sizes["none"])
    assert plan.streamed_blocks == int(count)
    assert (plan.max_graph_tokens > 0) is graphs
    assert plan.text_encoder_resident
    assert plan.max_sequences == 256


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"streamed_blocks": "29"}, "^streamed_blocks: must be at most 28, .* got 29$"),
        (
            {"streamed_blocks": "5", "cuda_graphs": "on"},
            "^streamed_blocks: 5 blocks cannot be streamed with cuda_graphs on",
        ),
        ({"streamed_blocks": "0"}, "^gpu_memory: 11.2 GiB are free, .*; streamed_blocks auto"),
        ({"cuda_graphs": "on"}, "without cuda_graphs on, leaves blocks of the transformer on"),
        (
            {"lora_dir": "adapters", "lora_memory_gib": 9.0},
            "at least 1[2-9].. are needed; a smaller lora_memory_gib leaves more to the model$",
        ),
        ({"text_encoder": "resident"}, "text_encoder auto leaves the encoder on the host"),
    ],
)
def test_what_cannot_be_ends_with_what_would_help(builders, sizes, config, named):
    builder = replace(builders["int8"], config=RunnerConfig(**config))
    with pytest.raises(ConfigError, match=named):
        builder.plan_for(known_gpu("3060").gpu, sizes=sizes["int8"])


def test_graphs_that_have_to_be_are_not_given_up(builders, sizes):
    def planned(name: str, graphs: str):
        builder = replace(builders["none"], config=RunnerConfig(cuda_graphs=graphs))
        return builder.plan_for(known_gpu(name).gpu, sizes=sizes["none"])

    assert planned("5090", "auto").max_graph_tokens == 0
    plan = planned("5090", "on")
    assert plan.max_graph_tokens > 0
    assert plan.max_image_tokens < 16384  # other things are
    assert "CUDA graphs" not in plan.given_up
    assert planned("H200", "on") == planned("H200", "auto")
    with pytest.raises(ConfigError, match=r"; cuda_graphs auto does without graphs$"):
        planned("3090", "on")


def test_too_little_host_memory_is_told_before_it_is_taken(builders, sizes):
    gpu = known_gpu("3060").gpu
    whole = builders["int8"].plan_for(gpu, sizes=sizes["int8"])
    found = builders["int8"].plan_for(gpu, whole.pinned_bytes, sizes["int8"])
    assert found == whole
    # Smaller images leave more of the GPU to blocks.
    smaller = builders["int8"].plan_for(gpu, whole.pinned_bytes - 1, sizes["int8"])
    assert smaller.max_image_tokens < whole.max_image_tokens
    assert smaller.pinned_bytes < whole.pinned_bytes
    with pytest.raises(ConfigError, match=r"^host memory: 4\.0 GiB can be taken, at least 1\d"):
        builders["int8"].plan_for(gpu, 4 * GIB, sizes["int8"])
    with pytest.raises(ConfigError, match="--quantization int8 halves the transformer"):
        builders["none"].plan_for(gpu, 12 * GIB, sizes["none"])
    # What fits on the GPU needs none.
    assert builders["int8"].plan_for(known_gpu("H200").gpu, 0, sizes["int8"]).streamed_blocks == 0


GPUS = st.floats(1, 160)
HOSTS = st.floats(0, 64)
REQUESTS = st.builds(
    MemoryRequest,
    max_pack_tokens=st.sampled_from((33792, 4000)),
    max_image_tokens=st.sampled_from((16384, 12000, 4096, 256)),
    max_sequences=st.sampled_from((256, 20, 3)),
    branches_per_sequence=st.sampled_from((1, 2)),
    adapter_bytes=st.sampled_from((0, 2 * GIB)),
    slot_bytes=st.sampled_from((0, 2 * GIB)),
    text_encoder=st.sampled_from(("auto", "resident", "offload")),
    max_graph_tokens=st.sampled_from((0, 6502)),
    graphs=st.booleans(),
    streamed_blocks=st.sampled_from((None, None, 0, 7, 28)),
)


def planned(sizes, total: float, host: float, request: MemoryRequest):
    gpu = Gpu(int((total - 0.5) * GIB), int(total * GIB), (8, 9))
    request = replace(request, host_bytes=int(host * GIB))
    return plan_memory(gpu.free, gpu.total, on_gpu(sizes, gpu), request)


@given(GPUS, HOSTS, REQUESTS, st.sampled_from(("none", "int8")))
def test_neither_gpu_nor_host_is_asked_for_more_than_it_has(sizes, total, host, request, format):
    try:
        plan = planned(sizes[format], total, host, request)
    except ConfigError:
        return
    assert plan.planned <= plan.free
    assert plan.pinned_bytes <= host * GIB
    assert request.streamed_blocks in (None, plan.streamed_blocks)
    assert plan.streamed_blocks == 0 or plan.max_graph_tokens == 0
    assert 1 <= plan.max_encoded_prompts <= 8
    assert min(4, request.max_sequences) <= plan.max_sequences <= request.max_sequences
    # The engine runs the largest image alone, whatever the budget, with both its branches.
    largest = request.branches_per_sequence * (plan.max_image_tokens + 512)
    assert plan.max_pack_tokens >= min(request.max_pack_tokens, largest)
    (work,) = (size for what, size, _ in plan.rows if what == "steps, encoding")
    assert work >= largest * sizes[format].step_per_token


@given(
    st.floats(4, 60),
    st.floats(0, 20),
    HOSTS,
    st.floats(0, 16),
    REQUESTS,
    st.sampled_from(("none", "int8")),
)
def test_more_memory_of_gpu_or_host_never_gives_up_more(
    sizes, total, more, host, more_host, request, format
):
    def rank(total: float, host: float):
        try:
            plan = planned(sizes[format], total, host, request)
        except ConfigError:
            return ()
        small = any(line.startswith("caches of") for line in plan.given_up)
        return (
            plan.max_image_tokens,
            -plan.streamed_blocks,
            not small,
            plan.text_encoder_resident,
            plan.max_graph_tokens > 0,
            plan.max_pack_tokens == request.max_pack_tokens,
            plan.overlapped_decodes,
            plan.max_graph_tokens,
            plan.max_sequences,
        )

    assert rank(total, host) <= rank(total + more, host + more_host)
