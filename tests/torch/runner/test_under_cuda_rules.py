"""Production code on its CUDA branches, held to CUDA's rules: see `tests.cuda_rules`.

Values mean nothing here; that the pictures are right is tested on a CPU.
"""

import contextlib
import multiprocessing
import random
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import settings

from krea2_srt import offline
from krea2_srt.engine.config import EngineConfig
from krea2_srt.engine.cost import CostModel
from krea2_srt.engine.engine import Engine
from krea2_srt.engine.events import Ended, Progress
from krea2_srt.engine.lifecycle import Sequence, State
from krea2_srt.errors import OutOfMemoryError
from krea2_srt.kernels.products import (
    ScaledProduct,
    scaled_product_torch,
    scaled_product_triton,
)
from krea2_srt.kernels.quantize import pieces_of
from krea2_srt.lora.adapter import Adapter, Factor
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.model.dit_files import load_dit
from krea2_srt.model.offload import offload
from krea2_srt.model.quantization import Quantization, QuantizedLinear
from krea2_srt.request import AdapterUse, ImageRequest
from krea2_srt.runner.builder import RunnerBuilder
from krea2_srt.runner.calibration import calibrate, device_name
from krea2_srt.runner.config import RunnerConfig
from krea2_srt.runner.device_errors import device_errors
from krea2_srt.runner.device_state import DeviceState
from krea2_srt.runner.executor import RunnerExecutor
from krea2_srt.runner.graphs import CudaCapture
from krea2_srt.runner.model_runner import STREAM_PRIORITY, Krea2Runner
from krea2_srt.runner.warm_up import keep_winners
from tests.torch.cuda_rules import Machine, cuda_rules
from tests.torch.cuda_rules.device_branches import Questions
from tests.torch.cuda_rules.models import small_runner
from tests.torch.cuda_rules.tensors import CUDA

COST = CostModel(floor=0, launch=8.0, per_token=1.0, per_square=1e-3, blocks=2, decode_launch=1)
"""So dear that a step of 128 x 128 pixels takes two slices, and of 64 x 64 but one."""

CONFIG = EngineConfig(max_turn_ms=60, max_queue_s=1e6)
MAX_GRAPH_TOKENS = 256


@pytest.fixture
def cuda() -> Iterator[Machine]:
    with cuda_rules() as machine, torch.inference_mode():
        yield machine


@pytest.fixture
def runner(cuda: Machine) -> Krea2Runner:
    return small_runner()


@pytest.fixture
def with_graphs(runner: Krea2Runner) -> Krea2Runner:
    use_graphs(runner)
    return runner


def use_graphs(runner: Krea2Runner) -> None:
    runner.use_graphs(CudaCapture(CUDA, STREAM_PRIORITY), MAX_GRAPH_TOKENS)
    runner.use_text_graphs(CudaCapture(CUDA, STREAM_PRIORITY))


def start(
    runner: Krea2Runner, prompt: str = "a cat", side: int = 64, steps: int = 4, guidance: float = 0
) -> DeviceState:
    image = ImageRequest(prompt, side, side, steps, guidance, "rain")
    return runner.start(image, runner.encode(image.prompts))


def finish(runner: Krea2Runner, pack: list[DeviceState]) -> None:
    while not all(sequence.done for sequence in pack):
        assert runner.step([s for s in pack if not s.done]) == []
    for sequence in pack:
        runner.decode(sequence)


def executor_of(runner: Krea2Runner, overlapped: bool = True) -> RunnerExecutor:
    return RunnerExecutor(runner, side_stream=runner.side_stream if overlapped else None)


def image(prompt: str = "a cat", side: int = 64, steps: int = 2, **fields) -> ImageRequest:
    return ImageRequest(prompt, side, side, steps, **fields)


def run(engine: Engine) -> dict[str, State]:
    ended = {}
    for _ in range(200_000):
        if engine.idle:
            return ended
        events = engine.turn()
        if events is None:
            time.sleep(1e-3)  # decodes are launched by another thread
        for event in events or []:
            if isinstance(event, Ended):
                ended[event.request.id] = event.request.state
    raise AssertionError("the engine does not come to an end")


# Single steps.


def test_a_step_runs_eagerly(runner):
    finish(runner, [start(runner), start(runner, "a dog in the rain", side=128, guidance=3.5)])


def test_a_step_is_replayed(with_graphs):
    runner = with_graphs
    for _ in range(3):
        finish(runner, [start(runner)])
    assert len(runner.graphs) == 1
    assert runner.graphs.record.failures == {}


def test_one_graph_serves_packs_under_guidance_and_without(with_graphs):
    runner = with_graphs
    for _ in range(3):
        finish(runner, [start(runner, side=32, guidance=3.5), start(runner, "a dog", side=32)])
    assert len(runner.graphs) >= 1
    assert runner.graphs.record.failures == {}


def test_a_whole_schedule_is_one_graph(with_graphs):
    runner = with_graphs
    for _ in range(3):
        sequence = start(runner, steps=4)
        assert runner.step([sequence], 4) == []
        assert sequence.done
    assert runner.graphs.record.failures == {}


def test_graphs_are_captured_before_their_packs_come(with_graphs):
    runner = with_graphs
    assert runner.prepare([start(runner)])
    assert runner.prepare([start(runner)], 4)
    finish(runner, [start(runner)])


INT8 = Quantization("int8", rotation=True)
EIGHT_BITS = [Quantization("fp8"), Quantization("fp8", rotation=True), INT8]


@pytest.mark.parametrize("product", [scaled_product_torch, scaled_product_triton])
@pytest.mark.parametrize("quantization", EIGHT_BITS, ids=lambda q: q.name)
def test_a_step_in_8_bits(cuda, quantization, product):
    runner = small_runner(quantization)
    multiply_by(runner, product)
    finish(runner, [start(runner)])
    use_graphs(runner)
    for _ in range(3):
        finish(runner, [start(runner)])
    assert len(runner.graphs) == 1
    assert runner.graphs.record.failures == {}


def multiply_by(runner: Krea2Runner, product: ScaledProduct) -> None:
    for module in runner.dit.modules():
        if isinstance(module, QuantizedLinear):
            module.product = product


def queued_by_a_step(cuda: Machine, quantization: Quantization) -> Counter[str]:
    """Kernels of Triton's and operations of torch's of a step, by name."""
    runner = small_runner(quantization)
    multiply_by(runner, scaled_product_triton)
    finish(runner, [start(runner, steps=1)])
    sequence, queued = start(runner, steps=1), Counter[str]()
    launch, dispatch = cuda.launch, cuda.dispatch

    def counted_launch(kernel, args, kwargs):
        queued[kernel.__name__] += 1
        launch(kernel, args, kwargs)

    def counted_dispatch(func, args, kwargs):
        queued[str(func)] += 1
        return dispatch(func, args, kwargs)

    with (
        mock.patch.object(cuda, "launch", counted_launch),
        mock.patch.object(cuda, "dispatch", counted_dispatch),
    ):
        assert runner.step([sequence]) == []
    return queued


def test_int8_runs_the_kernels_that_fp8_runs_and_no_operations_of_torch_beside_them(cuda):
    found = queued_by_a_step(cuda, INT8)
    assert found == queued_by_a_step(cuda, Quantization("fp8"))
    blocks = 2
    assert found["_product_kernel"] == 4 * blocks
    assert found["_norm_kernel"] >= 2 * blocks  # what they write is quantised
    assert found["_gate_kernel"] == 2 * blocks
    assert found["_quantize_kernel"] == 0
    assert not any("int_mm" in name or "round" in name for name in found)


def test_prompts_are_encoded_eagerly_and_replayed(with_graphs):
    runner = with_graphs
    for prompts in (["a cat"], ["a dog"], ["a cow", "a red fox"], ["a pig", "a blue fox"], ["x"]):
        runner.contexts.clear()
        assert len(runner.encode(prompts)) == len(prompts)
    _, prompts = runner.all_graphs
    assert len(prompts) >= 1
    assert prompts.record.failures == {}
    finish(runner, [start(runner)])


def test_a_sliced_step_and_a_step_that_is_dropped(runner):
    sequence = start(runner)
    runner.begin_step([sequence]).run(range(1))
    finish(runner, [sequence])


# The engine.


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
def test_requests_are_generated(runner, graphs, overlapped):
    if graphs:
        use_graphs(runner)
    executor = executor_of(runner, overlapped)
    engine = Engine(executor, COST, CONFIG)
    for number in range(4):
        engine.submit(f"{number}", [image(steps=1 + number)])
    engine.submit("large", [image(side=128, guidance=2.0, num_images=2)])
    assert set(run(engine).values()) == {State.DONE}
    found = executor.statistics()
    assert found["device_memory_peak_bytes"] >= found["device_memory_bytes"] > 0


@pytest.mark.parametrize("graphs", [False, True])
def test_the_device_never_waits_for_the_host_between_steps(runner, cuda, graphs):
    if graphs:
        use_graphs(runner)
    executor = executor_of(runner)
    for _ in range(3):  # what is new is encoded, captured and remembered
        cuda.ran_dry.clear()
        engine = Engine(executor, COST, CONFIG)
        request = engine.submit("a", [image(steps=3, num_images=2)])
        while not all(sequence.state is State.DECODING for sequence in request.sequences):
            engine.turn()
        ran_dry = list(cuda.ran_dry)
        run(engine)
    assert ran_dry == []


def test_the_library_generates(with_graphs, cuda):
    model, previews = offline.Krea2(with_graphs), []
    for _ in range(3):  # eagerly, then on graphs
        images = model.generate(
            ["a cat", "a dog in the rain"],
            size=(64, 32),
            steps=3,
            previews=1,
            on_progress=lambda progress: previews.append(progress.preview),
        )
        assert [image.size for image in images] == [(64, 32)] * 2
    assert [preview.size for preview in previews if preview] == [(64, 32)] * 6
    cuda.fail_allocations(10)
    with pytest.raises(OutOfMemoryError):
        model.generate("a dog", size=(128, 128), steps=2)
    cuda.allocator.fail_at.clear()
    assert len(model.generate("a dog", size=(128, 128), steps=2)) == 1


def test_previews_are_generated_beside_the_steps(runner, cuda):
    executor = executor_of(runner)
    engine = Engine(executor, COST, CONFIG)
    request = engine.submit("a", [image(steps=4)])
    request.sequences[0].wants_previews = True
    generated = []
    while not engine.idle:
        for event in engine.turn() or []:
            if isinstance(event, Progress):
                latents = executor.predict(event.sequence)
                if latents is not None:
                    with cuda.no_waits():
                        generated.append(executor.render_preview(latents))
    # In the order in which they were begun, so before the picture.
    assert [preview.pixels().shape for preview in generated] == [(64, 64, 3)] * len(generated)
    assert len(generated) >= 3


def test_sleep_and_wake(with_graphs, cuda):
    runner = with_graphs
    for _ in range(3):
        finish(runner, [start(runner)])
    executor_of(runner).release_graphs()
    torch.cuda.synchronize()
    for part in (runner.dit, runner.text_encoder.model, runner.vae):
        part.to("cpu")
    torch.cuda.empty_cache()
    for part in (runner.dit, runner.text_encoder.model, runner.vae):
        part.to(CUDA)
    for _ in range(3):
        finish(runner, [start(runner)])
    assert len(runner.graphs) == 1


# Out of memory.


def generated(executor: RunnerExecutor, name: str, **fields) -> State:
    """How a request ends, and that nothing of it is left."""
    engine = Engine(executor, COST, CONFIG)
    request = engine.submit(name, [image(name, side=32, **fields)])
    (state,) = run(engine).values()
    assert (state is State.FAILED) == isinstance(request.error, OutOfMemoryError), request.error
    for sequence in request.sequences:
        pixels = executor.take_pixels(sequence)
        assert (pixels is not None) == (state is State.DONE)
    assert executor.empty
    return state


def fail_each_allocation(cuda: Machine, runner: Krea2Runner, every: int, **fields) -> int:
    """Let the k-th allocation of a request fail, for each k; how many requests failed of it."""
    executor = executor_of(runner)
    failed = 0
    for number in range(1, 100_000, every):
        runner.contexts.clear()
        before = cuda.allocator.out_of_memory
        cuda.fail_allocations(number)
        state = generated(executor, f"a cat {number}", **fields)
        if cuda.allocator.out_of_memory == before:
            assert state is State.DONE
            assert number > 20, "hardly anything was allocated"
            return failed
        failed += state is State.FAILED
        cuda.allocator.fail_at.clear()
        if failed % 8 == 0:
            assert generated(executor, "and the next") is State.DONE
    raise AssertionError("there is no end to the allocations")


def test_any_allocation_may_run_out_of_memory(cuda, runner):
    assert fail_each_allocation(cuda, runner, every=1, steps=1) > 20


def test_memory_may_run_out_in_a_capture(cuda, with_graphs):
    for _ in range(2):
        generated(executor_of(with_graphs), "a cat")
    with_graphs.release_graphs()
    fail_each_allocation(cuda, with_graphs, every=7)
    assert cuda.allocator.recording == []


def test_memory_is_all_given_back(cuda, runner):
    executor = executor_of(runner)
    for _ in range(2):
        generated(executor, "a cat", steps=2)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for number in range(5):
        generated(executor, "a cat", steps=2, seed=number)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


# Random schedules.


def schedule(seed: int, failing: bool, streamed: tuple[int, ...] = ()) -> None:
    """Requests at random moments, with cancels, previews, failures and sleep, to their end.

    Args:
        seed: of all that is random.
        failing: whether an allocation fails now and then too.
        streamed: blocks that come from host memory; of five blocks then, and without graphs.
    """
    random_ = random.Random(seed)
    with cuda_rules() as cuda, torch.inference_mode():
        runner = small_runner(blocks=5, streamed=streamed) if streamed else small_runner()
        if not streamed and random_.random() < 0.7:
            use_graphs(runner)
        cuda.looks = random_.choice([0, 1, 3])
        executor = executor_of(runner, overlapped=random_.random() < 0.7)
        engine = Engine(executor, replace(COST, blocks=runner.num_blocks), CONFIG)
        waiting = random_.randint(1, 6)
        accepted, ended = 0, 0
        while waiting or not engine.idle:
            events = []
            if waiting and (engine.idle or random_.random() < 0.3):
                waiting -= 1
                request = engine.submit(
                    f"{accepted}",
                    [
                        image(
                            random_.choice(["a cat", "a red fox in the snow"]),
                            random_.choice([32, 64, 128]),
                            random_.randint(1, 3),
                            guidance=random_.choice([0.0, 0.0, 3.5]),
                            num_images=random_.choice([1, 1, 2]),
                        )
                    ],
                    priority=random_.randint(-1, 1),
                )
                accepted += 1
                if random_.random() < 0.3:
                    request.sequences[0].wants_previews = True
            if failing and random_.random() < 0.05:
                cuda.fail_allocations(random_.randint(1, 200))
            if random_.random() < 0.02:
                cuda.read = lambda tensor, number: 1 - number  # not finite
            turn = engine.turn()
            cuda.read = None
            if turn is None:
                time.sleep(1e-3)  # decodes are launched by another thread
                continue
            events += turn
            if engine.requests and random_.random() < 0.05:
                events += engine.cancel(random_.choice(list(engine.requests)))
            if random_.random() < 0.02:
                if streamed:
                    executor.release_memory()
                executor.release_graphs()
                torch.cuda.empty_cache()
            for event in events:
                match event:
                    case Progress(sequence):
                        preview(executor, sequence)
                    case Ended(request):
                        ended += 1
                        for sequence in request.sequences:
                            executor.take_pixels(sequence)
        assert ended == accepted
        assert executor.empty
        executor.close()
        assert cuda.allocator.recording == []
        assert cuda.captures == []


def preview(executor: RunnerExecutor, sequence: Sequence) -> None:
    """Generate one if somebody wants to see it; nobody waits for it, and it may find no memory."""
    with contextlib.suppress(OutOfMemoryError):
        latents = executor.predict(sequence)
        if latents is not None:
            executor.render_preview(latents)


@pytest.mark.parametrize("seed", range(18))
def test_random_schedules(seed):
    schedule(seed, failing=seed % 3 == 0)


def faults(seeds: range) -> dict[int, str]:
    """What went wrong with schedules, by seed; in half of them an allocation fails now and then."""
    found = {}
    for seed in seeds:
        try:
            schedule(seed, failing=seed % 2 == 0)
        except Exception as error:
            found[seed] = "".join(traceback.format_exception(error))
    return found


@pytest.mark.slow
def test_many_random_schedules():
    """As many as a property has examples: each takes half a second."""
    seeds = range(1000, 1000 + settings.default.max_examples)
    # In processes of their own, since one takes a core and no more.
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        tens = [seeds[first : first + 10] for first in range(0, len(seeds), 10)]
        found = {seed: fault for some in pool.map(faults, tens) for seed, fault in some.items()}
    assert not found, f"seeds {sorted(found)}; the first: {found[min(found)]}"


# Starts, and all branches.


def started(folder: Path, quantization: Quantization | None = None, **settings: Any) -> Krea2Runner:
    """A checkpoint loaded as a server does."""
    checkpoint, dtype = Krea2Checkpoint.from_folder(folder), torch.bfloat16
    config = RunnerConfig(**settings)
    setup = RunnerBuilder(
        checkpoint, CUDA, dtype, dtype, dtype, config=config, quantization=quantization
    )
    return setup.load(setup.plan())


@pytest.mark.parametrize("quantization", [None, INT8], ids=["bf16", "int8"])
def test_a_server_starts_and_warms_up(cuda, demo_model, quantization):
    runner = started(demo_model, quantization, warm_up_s=0.2)
    assert runner.dit.operations.name == "triton"
    with runner.on_stream():  # as the executor does: warm-up may have ended on it
        for _ in range(2):
            finish(runner, [start(runner)])
    assert runner.graph_statistics()["graph_failures"] == {}


def test_offloaded_weights_wait_in_pinned_memory(cuda):
    layer = torch.nn.Linear(4, 4)
    offload([layer], CUDA)
    assert layer.weight.is_pinned()


def with_an_adapter(runner: Krea2Runner) -> AdapterUse:
    """One of a matrix of each block, on the device."""
    width = runner.dit.config.hidden_size
    factor = Factor(torch.ones(2, width), torch.ones(width, 2))
    adapter = Adapter("x", "x", {"blocks.0.attn.qkvg": (factor,)})
    placed = runner.adapters.add(adapter)
    host = runner.adapters.host_copy("x")
    for side, device in ((placed, "cuda"), (host, "cpu")):
        (found,) = side.factors[runner.dit.blocks[0].attn.qkvg]
        assert found.down.device.type == found.up.device.type == device
    assert found.down.is_pinned()
    assert found.up.is_pinned()
    return AdapterUse("x", "x")


def test_an_adapter_goes_to_the_device_from_pinned_memory(cuda):
    runner = small_runner()
    adapters = frozenset({with_an_adapter(runner)})
    assert generated(executor_of(runner), "a cat", adapters=adapters) is State.DONE


def test_every_question_about_the_device_is_answered_for_a_gpu(demo_model):
    questions = Questions(Path(offline.__file__).parent)
    assert len(questions.all) > 20
    with questions.noted(), cuda_rules() as cuda, torch.inference_mode():
        assert offline.device_of("auto").type == "cuda"
        test_offloaded_weights_wait_in_pinned_memory(cuda)
        test_an_adapter_goes_to_the_device_from_pinned_memory(cuda)
        assert device_name(CUDA) == "rules of CUDA"
        assert len(pieces_of(torch.empty(2**10, 2**10, device=CUDA))) == 1
        started(demo_model, warm_up_s=0.0, kernels="triton")
        runner = small_runner(Quantization("fp8", rotation=True))
        use_graphs(runner)
        for overlapped in (False, True):
            assert (
                generated(executor_of(runner, overlapped), "a cat", seed=int(overlapped))
                is State.DONE
            )
        fp8 = Quantization("fp8")
        load_dit(demo_model / "transformer", CUDA, torch.bfloat16, fp8, on_host=(1,))
        runner = small_runner()
        assert calibrate(runner).blocks == runner.num_blocks
        executor = executor_of(runner, overlapped=False)
        executor.statistics()
        cuda.fail_allocations(10)
        assert generated(executor, "a dog") is State.FAILED
        with pytest.raises(RuntimeError, match="other"), device_errors():
            raise RuntimeError("other")
        runner.use_graphs(CudaCapture(CUDA, STREAM_PRIORITY), 512)
        keep_winners(runner)
    left = questions.never_on_cuda
    assert left == [], "\n".join(map(str, left))
