"""Blocks that come from host memory give what blocks on the device give, bit for bit."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from krea2_srt.engine.engine import Engine
from krea2_srt.engine.lifecycle import Request, State
from krea2_srt.engine.online_calibration import OnlineCalibration
from krea2_srt.lora.adapter import Adapter
from krea2_srt.lora.merge import merge
from krea2_srt.lora.reader import read_adapter
from krea2_srt.lora.rounding import Rounding
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.dit_files import load_dit
from krea2_srt.model.host_blocks import HostBlock
from krea2_srt.model.quantization import Quantization
from krea2_srt.request import AdapterUse, ImageRequest
from krea2_srt.runner.attention import SDPA, AttentionBackend, AttentionChoice
from krea2_srt.runner.device_state import DeviceState
from krea2_srt.runner.executor import RunnerExecutor
from krea2_srt.runner.model_runner import Krea2Runner
from krea2_srt.runner.streamed_blocks import streamed_positions
from tests.comparisons import CPU
from tests.torch.lora.forms import FORMS, random_pairs
from tests.torch.runner.late_uploads import LateUploads
from tests.torch.runner.test_executor import CONFIG, COST

BF16, FLOAT = torch.bfloat16, torch.float32
BLOCKS = 4
KINDS = {
    "plain": None,
    "fp8": Quantization("fp8"),
    "int8": Quantization("int8", rotation=True, keep=("2.attn.out", "3.*")),
}
STREAMED = [(0, 1, 2, 3), (0, 2, 3), (1, 3), (2,)]


class Failing:
    """Attention that runs out of memory where it is told to.

    Attributes:
        at: the calls from now on after which it does; None is never.
    """

    at: int | None = None

    def __call__(self, q, k, v, segments):
        if self.at is not None:
            self.at -= 1
            if self.at < 0:
                self.at = None
                raise torch.OutOfMemoryError("CUDA out of memory. No, really.")
        return SDPA.attend(q, k, v, segments)


@pytest.fixture(scope="module")
def adapter(runner: Krea2Runner, tmp_path_factory) -> Adapter:
    config = runner.dit.config
    return read_adapter(FORMS[0].write(random_pairs(config), tmp_path_factory.mktemp("x")), config)


@pytest.fixture(scope="module")
def adapters(adapter: Adapter) -> frozenset[AdapterUse]:
    return frozenset({AdapterUse("x", adapter.digest, 0.2)})


@pytest.fixture(scope="module")
def make(
    demo_model: Path, runner: Krea2Runner, adapter: Adapter
) -> Callable[..., tuple[Krea2Runner, Failing]]:
    """A runner, and its attention: by format, with blocks on the host or with none."""

    @cache
    def dit_of(kind: str, streamed: tuple[int, ...], dtype: torch.dtype) -> Krea2DiT:
        return load_dit(demo_model / "transformer", CPU, dtype, KINDS[kind], on_host=streamed)

    def make(kind: str, streamed: tuple[int, ...] = (), seed: int = 0, dtype=BF16):
        attention = Failing()
        backend = AttentionBackend("failing", attention, False, prompts=SDPA.attend)
        dit = dit_of(kind, streamed, dtype)
        found = Krea2Runner(
            dit, runner.text_encoder, runner.vae, runner.sampling, AttentionChoice(backend, None)
        )
        if streamed:
            found.stream_blocks(LateUploads(random.Random(seed)))
        found.adapters.add(adapter)
        return found, attention

    return make


def started(runner: Krea2Runner, number: int, adapters=frozenset()) -> DeviceState:
    """An image before its first step, of any words."""
    height, guidance = 32 + 16 * (number % 3), (0.0, 0.0, 2.5)[number % 3]
    image = ImageRequest("a cat", 32, height, 4, guidance, "rain", seed=number)
    generator = torch.Generator().manual_seed(number)
    width = runner.dit.config.hidden_size
    contexts = [torch.randn(5 + number, width, generator=generator) for _ in image.prompts]
    state = runner.start(image, contexts)
    state.adapters = runner.adapters.find(adapters)
    return state


@torch.inference_mode()
def script(runner: Krea2Runner, attention: Failing, adapters, seed: int) -> list[torch.Tensor]:
    """Whole steps, slices of several packs that take turns, drops and failures, all at random.

    Returns:
        What has become of each image.
    """
    random_ = random.Random(seed)
    states = [started(runner, n, adapters if n % 2 else frozenset()) for n in range(3)]
    paused: list[tuple[list, object, int]] = []
    for _ in range(10):
        busy = {id(state) for pack, _, _ in paused for state in pack}
        free = [s for s in states if id(s) not in busy and not s.done]
        action = random_.choice(["step", "slice", "slice", "slice", "drop", "fail", "release"])
        if action == "step" and free:
            runner.launch(random_.sample(free, random_.randint(1, len(free))))
        elif action == "slice":
            if free and (not paused or random_.random() < 0.4):
                pack = random_.sample(free, random_.randint(1, min(2, len(free))))
                paused.append((pack, runner.begin_step(pack), 0))
            if paused:
                pack, forward, at = paused.pop(random_.randrange(len(paused)))
                stop = random_.randint(at + 1, BLOCKS)
                forward.run(range(at, stop))
                if stop < BLOCKS:
                    paused.append((pack, forward, stop))
                else:
                    forward.finish()
        elif action == "drop" and paused:
            paused.pop()
        elif action == "fail" and free:
            attention.at = random_.randrange(BLOCKS)
            with suppress(torch.OutOfMemoryError):
                runner.launch(free[:1])
            assert attention.at is None
        elif action == "release" and random_.random() < 0.3:
            runner.release_memory()
    return [state.tokens for state in states]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=max(2, settings.default.max_examples // 20))
@given(seed=st.integers(0, 2**32), streamed=st.sampled_from(STREAMED))
def test_steps_slices_drops_and_failures(make, adapters, kind, seed, streamed):
    found = script(*make(kind, streamed, seed), adapters, seed)
    expected = script(*make(kind), adapters, seed)
    for got, wanted in zip(found, expected, strict=True):
        assert torch.isfinite(wanted).all()
        assert torch.equal(got, wanted)


@pytest.fixture(autouse=True)
def estimates_stay(monkeypatch):
    """What is packed and sliced must not depend on how busy the machine is."""
    monkeypatch.setattr(OnlineCalibration, "observe", lambda *_: None)


def some_images(adapters: frozenset[AdapterUse], seed: int) -> list[ImageRequest]:
    random_ = random.Random(seed)
    return [
        ImageRequest(
            "a cat",
            random_.choice([32, 96, 128]),
            64,
            random_.randint(1, 3),
            random_.choice([0.0, 0.0, 2.0]),
            "rain",
            seed=number,
            adapters=random_.choice([adapters, frozenset()]),
        )
        for number in range(4)
    ]


def pixels_of(executor: RunnerExecutor, request: Request) -> np.ndarray | None:
    (pixels,) = [executor.take_pixels(sequence) for sequence in request.sequences]
    return pixels


def served(make_one: tuple[Krea2Runner, Failing], images: list[ImageRequest], seed: int) -> list:
    """Requests through the engine and the executor, each in packs of its own, which take turns;
    with cancels and failures at random where there is a seed.

    Returns:
        The pixels of each; None of one that has failed or was cancelled.
    """
    (runner, attention), random_ = make_one, random.Random(seed)
    executor = RunnerExecutor(runner)
    config = replace(CONFIG, max_pack_sequences=1)
    engine = Engine(executor, replace(COST, blocks=BLOCKS), config)
    requests = [engine.submit(f"{n}", [one], priority=n % 2) for n, one in enumerate(images)]
    while not engine.idle:
        if seed and random_.random() < 0.05:
            attention.at = random_.randrange(2 * BLOCKS)
        engine.turn()
        if seed and engine.requests and random_.random() < 0.03:
            engine.cancel(random_.choice(sorted(engine.requests)))
    attention.at = None
    found = [pixels_of(executor, request) for request in requests]
    for request, pixels in zip(requests, found, strict=True):
        assert (request.state is State.DONE) == (pixels is not None)
    assert executor.empty
    return found


@pytest.mark.parametrize(("kind", "seed"), [("plain", 1), ("fp8", 2), ("int8", 3)])
def test_the_engine_generates_the_same_pictures(make, adapters, kind, seed):
    images = some_images(adapters, seed)
    expected = served(make(kind, dtype=FLOAT), images, 0)
    compared = 0
    for attempt in range(2):
        runner, attention = make(kind, STREAMED[attempt], seed, FLOAT)
        found = served((runner, attention), images, seed + 10 * attempt)
        for got, wanted in zip(found, expected, strict=True):
            assert got is None or (got == wanted).all()
            compared += got is not None
        assert runner.block_stream.uploads_queued > 4
    assert compared >= 2


@contextmanager
def shown_too_late(monkeypatch) -> Iterator[None]:
    """Without the wait for a block's upload."""
    with monkeypatch.context() as patch:
        patch.setattr(LateUploads, "wait", lambda self, moment: None)
        yield


def test_a_wait_that_is_missing_is_seen(make, monkeypatch):
    """The comparison is worth something."""
    runner, _ = make("plain", (0, 1, 2, 3), 1)
    with shown_too_late(monkeypatch):
        state = started(runner, 0)
        runner.launch([state])
    assert not torch.isfinite(state.tokens).all()


def test_weights_are_loaded_the_same_to_the_bit(demo_model, runner, adapter):
    for kind in KINDS.values():
        deltas = merge([(adapter, 0.7)], runner.dit.config, Rounding(BF16))
        path = demo_model / "transformer"
        resident = load_dit(path, CPU, BF16, kind, deltas)
        streamed = load_dit(path, CPU, BF16, kind, deltas, on_host=(0, 3))
        assert list(streamed.host_blocks) == [0, 3]
        for number in range(BLOCKS):
            both = (dit.blocks[number].linears for dit in (resident, streamed))
            for a, b in zip(*both, strict=True):
                assert a.weight.dtype is b.weight.dtype
                assert torch.equal(a.weight.view(torch.uint8), b.weight.view(torch.uint8))
                assert (a.scale is None) == (b.scale is None)
                assert a.scale is None or torch.equal(a.scale, b.scale)


def test_what_is_on_the_host_is_no_parameter(demo_model):
    dit = load_dit(demo_model / "transformer", CPU, BF16, on_host=(1,))
    names = [name for name, _ in dit.blocks[1].named_parameters() if name[:4] in ("attn", "ff.g")]
    assert names == ["attn.norm_q.scale", "attn.norm_k.scale"]
    (block,) = dit.host_blocks.values()
    linears = dit.blocks[1].linears
    assert all(linear.weight.untyped_storage().nbytes() == block.nbytes for linear in linears)
    assert isinstance(block, HostBlock)


@pytest.mark.parametrize("blocks", [1, 4, 28])
def test_positions_are_spread(blocks):
    for count in range(blocks + 1):
        found = streamed_positions(blocks, count)
        assert len(set(found)) == count
        assert all(0 <= position < blocks for position in found)
        # As many blocks between one and the next as between any others, in a circle.
        gaps = {
            (b - a) % blocks for a, b in zip(found, found[1:] + found[:1], strict=True) if count > 1
        }
        assert not gaps or max(gaps) - min(gaps) <= 1
