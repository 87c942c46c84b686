"""What clients are told of errors: the same code on the scheduler's channel and over HTTP."""

import pytest

from krea2_server.errors import ENGINE_RETRY_S, from_engine
from krea2_srt.errors import (
    DeadlineError,
    DrainingError,
    Krea2Error,
    ModelError,
    OutOfMemoryError,
    QueueFullError,
    RequestCancelledError,
    RequestError,
    kind_of,
)
from krea2_srt.messages import EngineError

TABLE = [
    (RequestError("width", "must be even"), "invalid_value", 400, None),
    (QueueFullError("full", 3.0), "queue_full", 429, True),
    (DrainingError("going"), "engine_unavailable", 503, True),
    (DeadlineError("late"), "deadline_exceeded", 504, False),
    (OutOfMemoryError("none left"), "out_of_memory", 503, False),
    (RequestCancelledError("gone"), "cancelled", 499, False),
    (ModelError("odd"), "generation_failed", 500, False),
    (ValueError("whatever"), "generation_failed", 500, False),
    (KeyError("whatever"), "generation_failed", 500, False),
]


@pytest.mark.parametrize(
    ("error", "code", "status", "retry"), TABLE, ids=[type(row[0]).__name__ for row in TABLE]
)
def test_each_error_has_its_code_and_status(error, code, status, retry):
    said = EngineError.of(error)
    assert said.code == code
    # The text of a foreign error may hold anything.
    assert said.message == (str(error) if isinstance(error, Krea2Error) else said.message)
    assert isinstance(error, Krea2Error) or "whatever" not in said.message
    answer = from_engine(said)
    assert (answer.status, answer.code, answer.retry) == (status, code, retry)


def subclasses(kind: type) -> set[type]:
    return {kind} | {deeper for child in kind.__subclasses__() for deeper in subclasses(child)}


def test_every_error_with_a_code_of_its_own_is_found_by_it():
    for kind in subclasses(Krea2Error):
        assert kind_of(kind.code).status == kind.status
        assert kind_of(kind.code).retry == kind.retry


def test_a_field_has_the_name_that_the_client_has_sent():
    answer = from_engine(EngineError.of(RequestError("steps", "must be a whole number")))
    assert answer.param == "num_inference_steps"
    assert answer.message == "num_inference_steps: must be a whole number"
    assert from_engine(EngineError.of(DeadlineError("late"))).param == "deadline_ms"


def test_what_can_be_tried_again_says_when():
    assert from_engine(EngineError.of(QueueFullError("full", 3.5))).retry_after_s == 3.5
    assert from_engine(EngineError.of(DrainingError("going"))).retry_after_s == ENGINE_RETRY_S
    assert from_engine(EngineError.of(ModelError("odd"))).retry_after_s is None


def test_a_device_that_is_out_of_memory_tells_clients_nothing_of_itself():
    answer = from_engine(EngineError.of(OutOfMemoryError("CUDA out of memory: 7 of 8 GiB")))
    assert "CUDA" not in answer.message


def test_a_code_that_is_not_known_is_a_failure():
    assert from_engine(EngineError("of tomorrow", "odd")).status == 500
