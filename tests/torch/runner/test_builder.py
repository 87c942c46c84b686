"""From settings to a runner: on a CPU, and wired as on a GPU with a recorder for its graphs."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from krea2_srt.engine.config import EngineConfig
from krea2_srt.engine.cost import roofline
from krea2_srt.engine.engine import Engine
from krea2_srt.errors import ConfigError
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.model.quantization import Quantization
from krea2_srt.request import ImageRequest
from krea2_srt.runner import builder as module
from krea2_srt.runner import warm_up
from krea2_srt.runner.attention import SDPA, AttentionBackend, AttentionChoice
from krea2_srt.runner.builder import RunnerBuilder
from krea2_srt.runner.caches import CacheBytes
from krea2_srt.runner.config import RunnerConfig
from krea2_srt.runner.executor import RunnerExecutor
from krea2_srt.runner.memory_sizes import GIB
from tests.comparisons import CPU, relative_error
from tests.torch.runner.recorded_graph import record
from tests.torch.runner.test_graphs import device_attention

FLOAT = torch.float32


@pytest.fixture
def builder(demo_model: Path) -> RunnerBuilder:
    return RunnerBuilder(Krea2Checkpoint.from_folder(demo_model), CPU, FLOAT, FLOAT, FLOAT)


def asked(builder: RunnerBuilder, **config) -> RunnerBuilder:
    return replace(builder, config=RunnerConfig(**config))


def generate(runner) -> torch.Tensor:
    sequence = runner.start(ImageRequest("a cat", 64, 48, 4, seed=3), runner.encode(["a cat"]))
    runner.step([sequence], 4)
    return sequence.tokens


def test_a_cpu_needs_no_plan_and_generates(builder, runner):
    assert builder.plan() is None
    assert builder.within(None) is builder.engine
    loaded = builder.load(None)
    assert loaded.graphs is None
    start_up = loaded.start_up
    assert 0 < start_up.imported_s <= start_up.loaded_s
    # It has read ahead, also where nobody had begun to.
    assert start_up.ahead.bytes_read > 10**6
    assert relative_error(generate(loaded), generate(runner)) <= 1e-6


def test_an_offloaded_encoder_is_possible_on_a_cpu_too(builder, runner):
    offloaded = asked(builder, text_encoder="offload").load(None)
    assert relative_error(generate(offloaded), generate(runner)) <= 1e-6


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"kernels": "triton"}, "^kernels: triton does not run on cpu"),
        ({"attention": "fa9"}, "^attention: must be one of auto, sdpa"),
        ({"attention": "torch_varlen"}, "^attention: torch_varlen does not run on cpu"),
        ({"products": "triton"}, "^products: triton multiplies matrices of --quantization fp8"),
        (
            {"products": "cublas"},
            "^products: must be one of auto, torch, sglang, sglang_convrot, triton",
        ),
        ({"fused_mlp": "on"}, "^fused_mlp: on needs Triton's kernels"),
        ({"cuda_graphs": "on"}, "^cuda_graphs: there are none on cpu"),
        ({"streamed_blocks": "2"}, "^streamed_blocks: none are streamed on cpu"),
    ],
)
def test_what_a_cpu_does_not_have_is_refused(builder, config, named):
    with pytest.raises(ConfigError, match=named):
        builder = asked(builder, **config)
        builder.load(builder.plan())


@pytest.fixture
def gpu(builder, monkeypatch) -> RunnerBuilder:
    """A GPU, as far as the plan can see."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 * GIB, 48 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    properties = SimpleNamespace(total_memory=48 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return replace(builder, device=torch.device("cuda"))


def test_a_gpu_is_planned_within_the_engines_limits(gpu):
    plan = gpu.plan()
    assert plan.free == 40 * GIB
    assert plan.max_image_tokens == 128 * 128
    assert gpu.within(plan) == gpu.engine
    small = replace(gpu, engine=EngineConfig(max_pack_tokens=2000, max_side=512))
    assert small.plan().max_pack_tokens == 2000
    assert small.plan().max_image_tokens == 32 * 32


def test_settings_reach_the_plan(gpu):
    assert asked(gpu, gpu_memory_gib=20).plan().free == 20 * GIB
    assert asked(gpu, cuda_graphs="off").plan().max_graph_tokens == 0
    assert asked(gpu, max_graph_tokens=1024).plan().max_graph_tokens == 1024
    assert not asked(gpu, text_encoder="offload").plan().text_encoder_resident
    without = replace(gpu, caches=CacheBytes(0, 0, 0))
    assert without.plan().cache_share == 1
    with pytest.raises(ConfigError, match=r"^gpu_memory: 0\.5 GiB are free"):
        asked(gpu, gpu_memory_gib=0.5).plan()


@pytest.mark.parametrize(
    ("format", "too_old", "oldest"), [("fp8", (8, 6), (8, 9)), ("int8", (7, 5), (8, 0))]
)
def test_8_bits_need_a_gpu_that_multiplies_them(gpu, monkeypatch, format, too_old, oldest):
    quantized = replace(gpu, quantization=Quantization(format))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: too_old)
    one_line = (
        rf"^quantization: {format} needs .* {oldest[0]}\.{oldest[1]} .* this one has {too_old[0]}"
    )
    with pytest.raises(ConfigError, match=one_line):
        quantized.plan()
    assert gpu.plan() is not None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: oldest)
    assert quantized.plan() is not None


def test_host_memory_is_looked_at_before_it_is_pinned(gpu, monkeypatch):
    offloaded = asked(gpu, text_encoder="offload")
    needed = offloaded.plan().pinned_bytes
    assert needed
    for available, fits in ((needed + module.HOST_MARGIN, True), (needed, False)):
        monkeypatch.setattr(module, "available_memory", lambda available=available: available)
        assert gpu.plan().pinned_bytes == 0
        if fits:
            assert offloaded.plan().pinned_bytes == needed
            continue
        with pytest.raises(ConfigError, match=r"^host memory: 0\.0 GiB can be taken, at least 0\."):
            offloaded.plan()


def test_what_a_plan_cuts_reaches_the_engine(gpu):
    plan = replace(gpu.plan(), max_pack_sequences=4, max_sequences=8)
    within = gpu.within(plan)
    assert (within.max_pack_sequences, within.max_active_sequences) == (4, 8)


@pytest.mark.parametrize(
    ("changes", "fused"),
    [
        ({}, True),
        ({"config": RunnerConfig(kernels="torch")}, False),
        ({"quantization": Quantization("fp8")}, False),
        ({"device": CPU}, False),
    ],
)
def test_attention_gates_only_where_the_gate_stands_alone(gpu, monkeypatch, changes, fused):
    class Chosen(Exception):
        pass

    def choose(*args, fused_gate):
        raise Chosen(fused_gate)

    monkeypatch.setattr(module, "choose_attention", choose)
    with pytest.raises(Chosen) as chosen:
        replace(gpu, **changes).load(None)
    assert chosen.value.args == (fused,)


def test_graphs_are_planned_for_what_fits_into_a_turn(gpu):
    assert gpu.plan().max_graph_tokens == 6502
    assert replace(gpu, engine=EngineConfig(max_turn_ms=100)).plan().max_graph_tokens == 3251
    assert replace(gpu, engine=EngineConfig(max_turn_ms=1000)).plan().max_graph_tokens == 16896
    int8 = replace(gpu, quantization=Quantization("int8"))
    assert int8.plan().max_graph_tokens == 2 * 6502
    assert asked(gpu, max_graph_tokens=9000).plan().max_graph_tokens == 9000


def test_what_the_plan_cuts_the_engine_does_not_take(gpu):
    plan = replace(gpu.plan(), max_pack_tokens=5000, max_image_tokens=64 * 64, max_sequences=16)
    config = gpu.within(plan)
    assert (config.max_pack_tokens, config.max_pixels) == (5000, 1024 * 1024)
    assert config.max_active_sequences == 16


@pytest.fixture
def as_on_a_gpu(builder, gpu, monkeypatch, caplog):
    """Load on the CPU by the way of a GPU."""
    caplog.set_level("INFO")
    attention = AttentionChoice(SDPA, AttentionBackend("device", device_attention, True))
    monkeypatch.setattr(module, "choose_attention", lambda *_, **__: attention)
    monkeypatch.setattr(module, "CudaCapture", lambda *_: record)
    monkeypatch.setattr(warm_up, "SIDES", (64, 32))
    monkeypatch.setattr(warm_up, "WHOLE_SIDES", (32,))
    monkeypatch.setattr(warm_up, "TEXT_TOKENS", (24, 60))

    def load(**config):
        config = {"max_graph_tokens": 400, **config}  # asked for, so that no race decides
        return asked(builder, **config).load(asked(gpu, **config).plan())

    return load


def test_graphs_are_captured_before_the_first_request(as_on_a_gpu, runner, caplog):
    loaded = as_on_a_gpu()
    # The largest; of 40, 28, 76 and 64 tokens, two of which share a bucket; two whole schedules.
    assert len(loaded.graphs) == 6
    assert len(loaded.prompt_encoder.graphs) == 3
    assert loaded.prompt_encoder.prompts_at_once == 8
    text = caplog.text
    assert "transformer" in text
    assert "with 9 CUDA graphs" in text
    for _ in range(3):
        assert torch.allclose(generate(loaded), generate(runner), atol=1e-4)


def test_steps_and_prompts_are_captured_into_pools_of_their_own(as_on_a_gpu, monkeypatch):
    made = []

    def capture(*_):
        made.append(lambda function: record(function))
        return made[-1]

    monkeypatch.setattr(module, "CudaCapture", capture)
    as_on_a_gpu()
    assert len(made) == 2


def test_what_graphs_have_done_is_published(as_on_a_gpu, monkeypatch, runner):
    assert "graphs" not in RunnerExecutor(runner).statistics()

    def capture(*_):
        def fails_for_prompts(function):
            if "TextGraphs" in function.__qualname__:
                raise RuntimeError("operation not permitted")
            return record(function)

        return fails_for_prompts

    monkeypatch.setattr(module, "CudaCapture", capture)
    loaded = as_on_a_gpu()
    generate(loaded)
    found = RunnerExecutor(loaded).statistics()
    assert found["graphs"] == len(loaded.graphs) == 6
    assert found["graphs_failed"] == 3
    size = "text encoder: up to 1 prompts of up to 64 tokens"
    assert found["graph_failures"][size] == "RuntimeError: operation not permitted"
    assert found["graph_replays"] == 4
    assert found["graph_misses_failed"] == 1
    assert found["graph_misses_too_large"] == found["graph_misses_first_use"] == 0


@pytest.mark.slow
def test_captures_keep_to_their_time(as_on_a_gpu, caplog):
    assert len(as_on_a_gpu(warm_up_s=1e-9).graphs) == 0
    assert "with 0 CUDA graphs; others follow when their sizes come" in caplog.text
    caplog.clear()
    assert len(as_on_a_gpu(warm_up_s=0.0).graphs) == 0
    assert "warm after" not in caplog.text


@pytest.mark.slow
def test_without_a_back_end_that_can_be_captured_there_are_no_graphs(
    as_on_a_gpu, monkeypatch, caplog
):
    monkeypatch.setattr(module, "choose_attention", lambda *_, **__: AttentionChoice(SDPA, None))
    assert as_on_a_gpu().graphs is None
    assert "no CUDA graphs: no attention back end can be captured" in caplog.text
    with pytest.raises(ConfigError, match=r"^cuda_graphs: attention sdpa cannot be captured"):
        as_on_a_gpu(cuda_graphs="on")


@pytest.mark.slow
def test_an_offloaded_encoder_is_not_replayed(as_on_a_gpu, runner):
    loaded = as_on_a_gpu(text_encoder="offload")
    assert loaded.prompt_encoder.graphs is None
    assert torch.allclose(generate(loaded), generate(runner), atol=1e-4)


@pytest.mark.slow
def test_the_products_are_chosen_for_the_model_that_was_loaded(as_on_a_gpu, monkeypatch):
    asked_for = []

    def with_fused_mlp(dit, setting):
        asked_for.append((dit, setting))
        return replace(dit.operations, fused_mlp_tokens=1088)

    monkeypatch.setattr(module, "with_fused_mlp", with_fused_mlp)
    monkeypatch.setattr(module, "product_candidates", lambda forced, *_, **__: {forced: None})
    monkeypatch.setattr(module, "use_fastest_product", lambda *given: asked_for.append(given))
    loaded = as_on_a_gpu(products="sglang", fused_mlp="off", cuda_graphs="off", warm_up_s=0.0)
    assert asked_for == [(loaded.dit, {"sglang": None}), (loaded.dit, "off")]
    assert loaded.dit.operations.fused_mlp_tokens == 1088


@pytest.mark.parametrize("quantization", [None, Quantization("fp8"), Quantization("int8")])
def test_a_gpu_runs_tritons_kernels_in_all_formats(gpu, quantization):
    setup = replace(gpu, quantization=quantization)
    assert setup._operations().name == "triton"
    assert asked(setup, kernels="triton")._operations().name == "triton"
    assert asked(setup, kernels="torch")._operations().name == "torch"
    on_cpu = replace(setup, device=CPU)
    assert on_cpu._operations().name == "torch"
    with pytest.raises(ConfigError, match=r"^kernels: triton does not run on cpu"):
        asked(on_cpu, kernels="triton")._operations()


@pytest.mark.parametrize("wants_previews", [False, True])
@pytest.mark.slow
def test_the_engine_generates_on_graphs_what_it_generates_without(
    as_on_a_gpu, runner, wants_previews
):
    pixels = []
    for each in (as_on_a_gpu(), runner):
        executor = RunnerExecutor(each)
        engine = Engine(executor, replace(roofline(), blocks=each.num_blocks))
        request = engine.submit("r", [ImageRequest("a cat", 32, 32, steps=8, seed=5)])
        if wants_previews:
            request.sequences[0].wants_previews = True
        while engine.turn() is not None:
            pass
        # All steps at once where there are graphs, and nobody who wants to see them.
        assert engine.counters.packs == (1 if each is not runner and not wants_previews else 8)
        assert engine.counters.steps == 8
        pixels.append(executor.take_pixels(request.sequences[0]))
        assert executor.empty
    assert abs(pixels[0].astype(int) - pixels[1]).max() <= 1


def test_nothing_switches_cudnns_search_on():
    """It would time plans for seconds, while requests wait, at each new picture size."""
    package = Path(module.__file__).parents[1]
    sources = [path.read_text() for path in package.rglob("*.py")]
    assert len(sources) > 50
    assert not any("cudnn.benchmark" in source for source in sources)
    assert not torch.backends.cudnn.benchmark
