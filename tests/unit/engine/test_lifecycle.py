import itertools

import pytest

from krea2_srt.engine.lifecycle import (
    ENDED,
    IllegalTransition,
    Request,
    Sequence,
    State,
)
from tests.unit.engine.fakes import image

LEGAL = {
    (State.WAITING, State.ENCODING),
    (State.ENCODING, State.DENOISING),
    (State.DENOISING, State.DECODING),
    (State.DECODING, State.DONE),
    *itertools.product(
        (State.WAITING, State.ENCODING, State.DENOISING, State.DECODING),
        (State.FAILED, State.CANCELLED),
    ),
}


def sequence_in(state: State) -> Sequence:
    sequence = Request("r", (image(),), 0, 0.0, None).sequences[0]
    sequence.state = state
    return sequence


@pytest.mark.parametrize(
    ("state", "following"), sorted(LEGAL, key=str), ids=lambda state: state.value
)
def test_a_legal_transition_works(state, following):
    sequence = sequence_in(state)
    sequence.move(following)
    assert sequence.state is following


@pytest.mark.parametrize(
    ("state", "following"),
    [pair for pair in itertools.product(State, State) if pair not in LEGAL],
    ids=lambda state: state.value,
)
def test_an_illegal_transition_raises_and_changes_nothing(state, following):
    sequence = sequence_in(state)
    with pytest.raises(IllegalTransition, match=f"r: {state.value} -> {following.value}$"):
        sequence.move(following)
    assert sequence.state is state


def test_done_failed_and_cancelled_are_the_ends():
    assert {state for state in State if state.ended} == ENDED
    assert {State.DONE, State.FAILED, State.CANCELLED} == ENDED


def test_a_request_for_several_images_has_a_waiting_sequence_for_each():
    request = Request("r", (image(256, 4), image(512, 8, guidance=2.0)), 0, 0.0, None)
    first, second = request.sequences
    assert [first.index, second.index] == [0, 1]
    assert first.request is second.request is request
    assert first.state is second.state is request.state is State.WAITING
    assert not request.ended
    assert first.tokens == (64 + 256,)
    assert second.tokens == (64 + 1024, 5 + 1024)


def test_prompts_are_encoded_once_and_negative_ones_only_under_guidance():
    images = (
        image(prompt="a", negative_prompt="unused"),
        image(prompt="b", negative_prompt="bad", guidance=3.5),
        image(prompt="a", negative_prompt="b", guidance=3.5),
    )
    assert Request("r", images, 0, 0.0, None).prompts == ["a", "b", "bad"]
