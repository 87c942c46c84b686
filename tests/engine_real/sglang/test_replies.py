"""What clients are told of errors, by the code that the server turns into a status."""

import pytest

from krea2_srt.errors import (
    DeadlineError,
    DrainingError,
    ModelError,
    OutOfMemoryError,
    QueueFullError,
    RequestError,
)

CODES = [
    (RequestError("width", "must be even"), "invalid_request"),
    (QueueFullError("full", 3.0), "queue_full"),
    (DrainingError("going"), "draining"),
    (DeadlineError("late"), "deadline"),
    (OutOfMemoryError("none left"), "out_of_memory"),
    (ModelError("odd"), "failed"),
    (ValueError("whatever"), "invalid_request"),
    (KeyError("whatever"), "failed"),
]


@pytest.mark.parametrize(("error", "code"), CODES, ids=[type(error).__name__ for error, _ in CODES])
def test_each_error_has_its_code(error, code):
    from krea2_srt.sglang.replies import engine_error

    found = engine_error(error)
    assert (found.code, found.message) == (code, str(error))
    assert found.field == getattr(error, "field", None)
    assert found.retry_after_s == getattr(error, "retry_after_s", None)
