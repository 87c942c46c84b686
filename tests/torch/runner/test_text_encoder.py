"""Prompt encoding against Diffusers, which runs all layers and pads to 512."""

import pytest
import torch

from krea2_srt.model.text_encoder import PREFIX_TOKENS
from krea2_srt.request import MAX_TEXT_TOKENS, SUFFIX_TOKENS
from tests.comparisons import PROMPT, relative_error

PROMPTS = [PROMPT, "", "x", "Ein Fuchs im Schnee. 雪の中の狐 🦊", "word " * 700]


@pytest.fixture(scope="module")
def expected(diffusers_pipeline):
    with torch.inference_mode():
        states, mask = diffusers_pipeline.get_text_hidden_states(PROMPTS)
    return [s[m] for s, m in zip(states, mask, strict=True)]


def test_hidden_states_equal_diffusers(runner, expected):
    for prompt, states in zip(PROMPTS, expected, strict=True):
        (found,) = runner.text_encoder.encode([prompt])
        assert found.shape == states.shape
        assert relative_error(found, states) <= 1e-5


def test_a_prompt_in_a_batch_equals_itself_alone(runner):
    for prompt, together in zip(PROMPTS, runner.text_encoder.encode(PROMPTS), strict=True):
        (alone,) = runner.text_encoder.encode([prompt])
        assert relative_error(together, alone) <= 1e-5


def test_a_long_prompt_is_cut_and_says_so(runner):
    ids, cut = runner.text_encoder.tokenize("word " * 700)
    assert cut
    assert len(ids) == PREFIX_TOKENS + MAX_TEXT_TOKENS
    assert ids[-SUFFIX_TOKENS:] == runner.text_encoder.tokenize("")[0][-SUFFIX_TOKENS:]
    assert not runner.text_encoder.tokenize("word " * 100)[1]


def test_only_the_layers_that_are_read_are_there(runner):
    assert len(runner.text_encoder.model.layers) == max(runner.text_encoder.select_layers)


def test_on_a_small_gpu_few_prompts_are_encoded_at_a_time(runner, monkeypatch):
    together = runner.prompt_encoder.encode(PROMPTS)
    rows = []
    states = runner.text_encoder.states
    monkeypatch.setattr(
        runner.text_encoder, "states", lambda ids: rows.append(len(ids)) or states(ids)
    )
    monkeypatch.setattr(runner.prompt_encoder, "prompts_at_once", 2)
    few = runner.prompt_encoder.encode(PROMPTS)
    assert rows == [2, 2, 1]
    for one, other in zip(few, together, strict=True):
        assert relative_error(one, other) <= 1e-5


def test_the_same_text_is_encoded_once(runner, monkeypatch):
    calls = []
    encode = runner.prompt_encoder.encode

    def counting(prompts, deltas):
        calls.append(list(prompts))
        return encode(prompts, deltas)

    monkeypatch.setattr(runner.prompt_encoder, "encode", counting)
    first = runner.encode(["never seen", "nor this", "never seen"])
    assert calls == [["never seen", "nor this"]]
    assert first[0] is first[2]
    second = runner.encode(["nor this", "never seen"])
    assert calls == [["never seen", "nor this"]]
    assert torch.equal(second[1], first[0])
    assert torch.equal(second[0], first[1])


def test_a_context_does_not_depend_on_its_batch(runner, monkeypatch):
    prompts = ["a blue house", "two cats on a very long sofa in the evening light"]
    batches = []
    states = runner.text_encoder.states
    monkeypatch.setattr(
        runner.text_encoder, "states", lambda ids: batches.append(len(ids)) or states(ids)
    )
    runner.contexts.clear()
    together = runner.encode(prompts)
    runner.contexts.clear()
    for prompt, context in zip(prompts, together, strict=True):
        assert relative_error(context, runner.encode([prompt])[0]) <= 1e-5
    assert batches == [2, 1, 1]
