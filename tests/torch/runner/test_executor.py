"""The engine on the real model runner, in float32: the same picture whatever else it generates."""

import random
import weakref

import numpy as np
import pytest
import torch

from krea2_srt.engine.config import EngineConfig
from krea2_srt.engine.cost import CostModel
from krea2_srt.engine.engine import Engine
from krea2_srt.engine.events import Ended, Progress
from krea2_srt.engine.lifecycle import State
from krea2_srt.engine.online_calibration import OnlineCalibration
from krea2_srt.errors import DeviceLostError, OutOfMemoryError
from krea2_srt.model.flops import step_flops, step_weight_bytes
from krea2_srt.model.pixels import to_uint8
from krea2_srt.request import ImageRequest
from krea2_srt.runner.device_errors import device_errors
from krea2_srt.runner.executor import RunnerExecutor
from krea2_srt.runner.packing import PackForward
from tests.comparisons import relative_error
from tests.torch.runner.test_pictures import finish, start

# So dear that a step of 160 x 160 pixels takes several slices, and of 64 x 64 but one.
COST = CostModel(floor=0, launch=8.0, per_token=1.0, per_square=1e-3, blocks=4, decode_launch=1)
CONFIG = EngineConfig(max_turn_ms=60, max_queue_s=1e6)


class Recording(RunnerExecutor):
    """Keeps the latents of sequences that have ended, and every pack."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.latents = {}
        self.packs = []

    def step(self, step, blocks):
        self.packs.append((len(step.sequences), len(blocks)))
        return super().step(step, blocks)

    def release(self, sequence):
        if sequence.state is State.DONE:
            self.latents[sequence] = self._states[sequence].tokens
        super().release(sequence)


@pytest.fixture
def executor(runner):
    return Recording(runner)


@pytest.fixture(autouse=True)
def estimates_stay(monkeypatch):
    """What is packed and sliced must not depend on how busy the machine is."""
    monkeypatch.setattr(OnlineCalibration, "observe", lambda *_: None)


@pytest.fixture
def engine(executor):
    return Engine(executor, COST, CONFIG)


def image(prompt="x", width=64, height=64, steps=2, **fields):
    return ImageRequest(prompt, width, height, steps, **fields)


def spoilt(tokens):
    tokens = torch.empty_like(tokens).copy_(tokens)
    tokens[0] = torch.nan
    return tokens


def run(engine) -> list:
    events = []
    while not engine.idle:
        events += engine.turn() or []
    return events


def alone(runner, image):
    sequence = start(
        runner,
        image.prompt,
        image.width,
        image.height,
        image.steps,
        image.seed,
        image.guidance,
        image.negative_prompt,
    )
    (pixels,) = finish(runner, [sequence])
    return sequence.tokens, pixels


@pytest.mark.parametrize("count", [16, pytest.param(40, marks=pytest.mark.slow)])
def test_requests_with_cancellations_equal_each_alone(engine, executor, runner, count):
    random_ = random.Random(3)
    requests = {}
    for i in range(count):
        requests[f"request {i}"] = image(
            random_.choice(["x", "a blue house", "a red fox in the snow " * 9]),
            16 * random_.randint(1, 14),
            16 * random_.randint(1, 14),
            random_.randint(1, 5),
            seed=random_.randint(0, 2**40),
            num_images=random_.choice([1, 1, 2]),
            guidance=random_.choice([0.0, 0.0, 3.5]),
            negative_prompt="rain",
        )
    waiting, ended = dict(requests), {}
    while waiting or not engine.idle:
        if waiting and (engine.idle or random_.random() < 0.3):
            name, wanted = waiting.popitem()
            engine.submit(name, [wanted], priority=random_.randint(-1, 1))
        events = engine.turn() or []
        if engine.requests and random_.random() < 0.02:
            events += engine.cancel(random_.choice(list(engine.requests)))
        for event in events:
            if isinstance(event, Ended):
                assert event.request.id not in ended
                ended[event.request.id] = event.request
    assert set(ended) == set(requests)
    done = [request for request in ended.values() if request.state is State.DONE]
    assert count // 2 < len(done) < count, "too few were left, or none was cancelled"
    for request in done:
        for sequence in request.sequences:
            tokens, pixels = alone(runner, sequence.image)
            assert relative_error(executor.latents[sequence], tokens) <= 1e-5
            difference = executor.take_pixels(sequence).astype(int) - to_uint8(pixels)
            assert np.abs(difference).max() <= 1
    assert max(size for size, _ in executor.packs) > 1, "nothing was packed"
    assert min(blocks for _, blocks in executor.packs) < 4, "nothing was sliced"
    for request in ended.values():  # of requests cancelled between two images
        for sequence in request.sequences:
            executor.take_pixels(sequence)
    assert executor.empty


@pytest.mark.parametrize("tile", [0, 32, None])
def test_decode_slices_are_the_decode(runner, tile):
    sequence = start(runner, "x", 96, 64, 1, 1)
    runner.step([sequence])
    slices = list(runner.decode_slices(sequence, tile))
    assert len(slices) > 10
    assert all(pixels is None for pixels in slices[:-1])
    assert torch.equal(slices[-1], runner.decode(sequence, tile))


def test_attention_in_slices_equals_attention_at_once(runner, monkeypatch):
    sequence = start(runner, "x", 96, 64, 1, 1)
    whole = runner.decode(sequence)
    from krea2_srt.model import vae

    monkeypatch.setattr(vae, "_MAX_SCORES", {"cpu": 96 * 10})
    assert relative_error(runner.decode(sequence), whole) <= 1e-6


def test_a_forward_that_is_dropped_changes_nothing(runner):
    sequence = start(runner, "x", 64, 64, 2, 1)
    before = sequence.tokens.clone()
    runner.begin_step([sequence]).run(range(2))
    assert sequence.step == 0
    assert torch.equal(sequence.tokens, before)


def test_a_preview_is_the_predicted_clean_image(engine, executor, runner):
    wanted = image(width=64, height=48, steps=4)
    request = engine.submit("a", [wanted])
    request.sequences[0].wants_previews = True
    previews = []
    while request.sequences[0].step < 3:
        if any(isinstance(event, Progress) for event in engine.turn()):
            latents = executor.predict(request.sequences[0])
            previews.append(executor.render_preview(latents).pixels())
    assert [preview.shape for preview in previews] == [(48, 64, 3)] * 3
    # After all but the last step, the prediction is what the last step makes of it.
    sequence = start(runner, "x", 64, 48, 4, 0)
    sequence.sequence.wants_previews = True
    for _ in range(4):
        runner.step([sequence])
    predicted = runner.vae.decode(runner.predicted_latents(sequence)[None])[0]
    assert relative_error(predicted, runner.decode(sequence)) <= 1e-5


def test_a_preview_is_at_most_256_pixels_wide(runner):
    sequence = start(runner, "x", 640, 320, 2, 1)
    sequence.sequence.wants_previews = True
    runner.step([sequence])
    assert runner.predicted_latents(sequence).shape == (16, 16, 32)


def test_a_step_that_fails_at_its_end_changes_no_sequence(executor, runner, monkeypatch):
    """Or those that had stepped would skip a step when it is run again."""
    pack = [start(runner, "x", 64, 64, 2, seed) for seed in (1, 2)]
    before = [sequence.tokens for sequence in pack]
    forward = runner.begin_step(pack)
    forward.run(range(runner.num_blocks))
    monkeypatch.setattr(torch, "isfinite", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forward.finish()
    assert [sequence.step for sequence in pack] == [0, 0]
    assert all(s.tokens is tokens for s, tokens in zip(pack, before, strict=True))


def test_nan_latents_fail_their_request_alone(engine, executor, runner):
    engine.submit("broken", [image(seed=1)])
    engine.submit("fine", [image(seed=2)])
    engine.turn()  # encodes both
    engine.turn()  # the first of two steps
    (broken,) = engine.requests["broken"].sequences
    executor._states[broken].tokens = spoilt(executor._states[broken].tokens)
    ended = {e.request.id: e.request for e in run(engine) if isinstance(e, Ended)}
    assert executor.packs[0][0] == 2
    assert ended["broken"].state is State.FAILED
    assert "non-finite" in str(ended["broken"].error)
    assert ended["fine"].state is State.DONE
    (fine,) = ended["fine"].sequences
    assert relative_error(executor.latents[fine], alone(runner, fine.image)[0]) <= 1e-5


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_has_one_name(executor, error):
    with pytest.raises(OutOfMemoryError), device_errors():
        raise error


def test_other_errors_keep_theirs(executor):
    with pytest.raises(RuntimeError, match="other"), device_errors():
        raise RuntimeError("other")


def test_what_ran_out_of_memory_is_let_go_before_the_cache_is_emptied(monkeypatch):
    """Or emptying it would give back nothing: frames of a traceback hold what they were doing."""
    held, alive = [], []

    def forward():
        tensors = [torch.zeros(8)]
        held.append(weakref.ref(tensors[0]))
        deeper(torch.zeros(8))

    def deeper(tensor):
        held.append(weakref.ref(tensor))
        try:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")
        except RuntimeError:
            raise torch.OutOfMemoryError("CUDA out of memory") from None

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.extend(ref() for ref in held))
    with pytest.raises(OutOfMemoryError) as raised, device_errors():
        forward()
    assert alive == [None, None]
    assert raised.value.__cause__ is not None


def test_a_step_that_runs_out_of_memory_leaves_nothing_in_the_executor(
    engine, executor, runner, monkeypatch
):
    """Its frame still runs while memory is given back, and must hold none of the step's tensors."""
    held, alive = [], []
    finish = PackForward.finish

    def fails(forward):
        held.append(weakref.ref(forward))
        monkeypatch.setattr(PackForward, "finish", finish)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PackForward, "finish", fails)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.extend(ref() for ref in held))
    engine.submit("a", [image()])
    run(engine)
    assert alive == [None]


def test_a_step_that_fails_once_it_is_launched_is_done_again(engine, executor, runner, monkeypatch):
    """Latents and counter go back together: none is a step ahead of the other."""
    launched = executor._in_flight.launched
    errors = [torch.OutOfMemoryError("no pinned memory")]

    def fails_at_first(*args):
        if errors:
            raise errors.pop()
        return launched(*args)

    monkeypatch.setattr(executor._in_flight, "launched", fails_at_first)
    wanted = [image(seed=seed, steps=3) for seed in (1, 2)]
    request = engine.submit("a", wanted)
    run(engine)
    assert errors == []
    assert request.state is State.DONE, request.error
    for sequence in request.sequences:
        assert sequence.step == 3
        tokens, _ = alone(runner, sequence.image)
        assert relative_error(executor.latents[sequence], tokens) <= 1e-5


def test_an_image_takes_memory_from_its_first_step_to_its_end(engine, executor):
    request = engine.submit("a", [image(width=160, height=160, steps=2)])
    (sequence,) = request.sequences
    engine.turn()
    state = executor._states[sequence]
    assert (sequence.state, state.tokens) == (State.DENOISING, None)
    engine.turn()
    assert state.tokens.shape == (100, 64)
    run(engine)
    tensors = [value for value in vars(state).values() if isinstance(value, torch.Tensor)]
    assert (tensors, state.contexts, state.decode) == ([], (), None)
    assert not executor.empty
    assert executor.take_pixels(sequence).shape == (160, 160, 3)
    assert executor.empty


class SideStream:
    """Runs at once, and is ready at the third look, or fails at it."""

    def __init__(self, *errors):
        self.errors = list(errors)

    def start(self, function, inputs):
        assert all(isinstance(tensor, torch.Tensor) for tensor in inputs)
        found = function()
        error = self.errors.pop(0) if self.errors else None
        looks = iter([None, None])

        class Job:
            def result(self):
                for look in looks:
                    return look
                if error is not None:
                    raise error
                return found

        return Job()


def test_an_overlapped_decode_that_runs_out_of_memory_is_tried_once_more(runner):
    error = torch.OutOfMemoryError("CUDA out of memory")
    executor = Recording(runner, side_stream=SideStream(error))
    engine = Engine(executor, COST, CONFIG)
    request = engine.submit("a", [image(steps=1)])
    run(engine)
    assert request.state is State.DONE
    assert executor.take_pixels(request.sequences[0]) is not None
    assert executor.empty


def test_a_gpu_that_a_decode_finds_lost_ends_the_process_and_not_the_request(runner, monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: unspecified launch failure")

    executor = Recording(runner, side_stream=SideStream(RuntimeError("cuDNN error: FAILED")))
    engine = Engine(executor, COST, CONFIG)
    request = engine.submit("a", [image(steps=1)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(DeviceLostError, match="cuDNN error"):
        run(engine)
    assert not request.ended


def test_a_preview_beside_the_steps_is_there_later(runner):
    executor = Recording(runner, side_stream=SideStream())
    engine = Engine(executor, COST, CONFIG)
    request = engine.submit("a", [image(steps=3)])
    request.sequences[0].wants_previews = True
    while request.sequences[0].step < 2:
        engine.turn()
    latents = executor.predict(request.sequences[0])
    generating = executor.render_preview(latents)
    assert [generating.pixels() for _ in range(2)] == [None, None]
    expected = to_uint8(runner.vae.decode(latents[None])[0])
    assert np.array_equal(generating.pixels(), expected)


def test_overlapped_decodes_do_not_hold_up_the_steps(runner):
    executor = Recording(runner, side_stream=SideStream())
    engine = Engine(executor, COST, CONFIG)
    for i in range(5):
        engine.submit(f"{i}", [image(seed=i, steps=1 + i)])
    ended = [e.request for e in run(engine) if isinstance(e, Ended)]
    assert all(request.state is State.DONE for request in ended)
    for request in ended:
        (sequence,) = request.sequences
        pixels = to_uint8(alone(runner, sequence.image)[1]).astype(int)
        assert np.abs(executor.take_pixels(sequence) - pixels).max() <= 1
    assert executor.empty


def test_a_broken_picture_of_an_overlapped_decode_fails(runner):
    executor = Recording(runner, side_stream=SideStream())
    engine = Engine(executor, COST, CONFIG)
    request = engine.submit("a", [image(steps=1)])
    while request.sequences[0].state is not State.DECODING:
        engine.turn()
    denoising = executor._states[request.sequences[0]]
    denoising.tokens = spoilt(denoising.tokens)
    run(engine)
    assert "non-finite" in str(request.error)
    assert executor.empty


def test_the_least_work_of_steps_is_counted_in_slices_as_in_one_piece(runner):
    counted = []
    for config in (CONFIG, EngineConfig(max_turn_ms=1e9, max_queue_s=1e6)):
        executor = Recording(runner)
        engine = Engine(executor, COST, config)
        request = engine.submit("a", [image(width=160, height=160, steps=3, guidance=2.0)])
        run(engine)
        counted.append((executor.statistics(), executor.packs))
        (sequence,) = request.sequences
        branches = sequence.tokens
    (sliced, slices), (whole, packs) = counted
    assert len(slices) > len(packs)
    assert whole["step_flops"] == pytest.approx(3 * sum(step_flops(runner.dit.config, branches)))
    assert whole["step_weight_bytes"] == 3 * 4 * step_weight_bytes(runner.dit.config)
    for name in ("step_flops", "step_weight_bytes"):
        assert sliced[name] == pytest.approx(whole[name])
