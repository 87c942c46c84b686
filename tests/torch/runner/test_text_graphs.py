"""The text encoder on graphs, with a recorder in place of CUDA's."""

import pytest
import torch

from krea2_srt.runner.attention import SDPA, AttentionBackend, AttentionChoice
from krea2_srt.runner.graphs import Eager
from krea2_srt.runner.prompt_encoder import PromptEncoder
from tests.comparisons import relative_error
from tests.torch.runner.recorded_graph import record
from tests.torch.runner.test_graphs import device_attention

SHORT, OTHER, LONG = "a cat", "two dogs in the rain", "a red fox in fresh snow " * 20


@pytest.fixture
def captures():
    return []


@pytest.fixture
def encoder(runner, captures):
    def capture(function):
        captures.append(function)
        return record(function)

    return on_graphs(runner, capture)


def on_graphs(runner, capture) -> PromptEncoder:
    device = AttentionBackend("device", device_attention, True)
    encoder = PromptEncoder(runner.text_encoder, runner.dit, AttentionChoice(SDPA, device))
    encoder.use_graphs(capture)
    return encoder


def check(encoder, runner, prompts):
    for got, expected in zip(
        encoder.encode(prompts), runner.prompt_encoder.encode(prompts), strict=True
    ):
        assert got.shape == expected.shape
        assert relative_error(got, expected) <= 1e-5


def test_prompts_on_a_graph_are_those_without(encoder, runner, captures):
    for prompts in ([SHORT], [OTHER], [SHORT], [LONG], [LONG], [SHORT, LONG, OTHER]):
        check(encoder, runner, prompts)
    # One for the two short ones, which have the same padded length, and one for the long one.
    assert len(captures) == 2
    check(encoder, runner, [LONG, OTHER, SHORT])
    check(encoder, runner, [OTHER, SHORT, LONG, SHORT + "s"])
    assert len(captures) == 3


def test_contexts_stay_when_the_graph_is_replayed(encoder):
    encoder.encode([SHORT])
    (first,) = encoder.encode([SHORT])
    before = first.clone()
    encoder.encode([OTHER])
    assert torch.equal(first, before)


def test_a_size_that_cannot_be_captured_runs_without_and_says_so_once(runner, caplog):
    def capture(function):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    encoder = on_graphs(runner, capture)
    for prompt in (SHORT, OTHER, SHORT, OTHER):
        check(encoder, runner, [prompt])
    (logged,) = [r.message for r in caplog.records if "text encoder graphs off" in r.message]
    assert "not permitted" in logged
    ((size, reason),) = encoder.graphs.failures.items()
    assert size == "up to 1 prompts of up to 64 tokens"
    assert reason == "RuntimeError: CUDA error: operation not permitted when stream is capturing"
    assert encoder.graphs.record.eager == {
        Eager.TOO_LARGE: 0,
        Eager.FIRST_USE: 1,
        Eager.FAILED: 3,
        Eager.ADAPTERS: 0,
    }


def test_a_size_that_fails_leaves_the_others_their_graphs(runner, captures):
    def capture(function):
        captures.append(function)
        if len(captures) == 1:
            raise RuntimeError("CUDA error: operation failed due to a previous error")
        return record(function)

    encoder = on_graphs(runner, capture)
    for prompt in (SHORT, SHORT, LONG, LONG):
        check(encoder, runner, [prompt])
    assert len(encoder.graphs) == 1


def test_a_size_that_found_no_memory_is_tried_again_when_there_is_some(runner, captures):
    def capture(function):
        captures.append(function)
        if len(captures) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return record(function)

    encoder = on_graphs(runner, capture)
    for _ in range(3):
        check(encoder, runner, [SHORT])
    assert len(captures) == 1
    assert encoder.graphs.failures
    encoder.graphs.record.memory_freed()
    check(encoder, runner, [SHORT])
    assert len(captures) == 2
    assert not encoder.graphs.failures
    assert encoder.graphs.record.replayed == 1


def test_prepared_sizes_need_no_uses(encoder, runner, captures):
    with torch.inference_mode():
        encoder.graphs.prepare(1, 64)
    assert len(captures) == 1
    check(encoder, runner, [SHORT])
    assert len(captures) == 1
    encoder.graphs.release()
    check(encoder, runner, [SHORT])
    assert len(captures) == 2
