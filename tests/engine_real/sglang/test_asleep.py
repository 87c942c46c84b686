"""The scheduler while SGLang has taken the weights away; SGLang can do that on a GPU only."""

from types import SimpleNamespace

import pytest

from krea2_srt.engine.lifecycle import State
from tests.unit.engine.fakes import Harness


@pytest.fixture
def harness():
    return Harness()


@pytest.fixture
def scheduler(harness):
    """What the loop looks at, around a real engine."""
    from krea2_srt.sglang.scheduler import Krea2Scheduler
    from krea2_srt.sglang.served_adapters import ServedAdapters

    class Asleep(Krea2Scheduler):
        def __init__(self):
            self.asleep = True
            self.worker = SimpleNamespace(is_sleeping=lambda: self.asleep)
            self._engine = harness.engine
            self._inflight_finalizes = []
            self._adapters = ServedAdapters(None)
            self.replies = []
            self._replies = SimpleNamespace(
                reply=lambda identity, payload, output: self.replies.append(output.error)
            )

    return Asleep()


@pytest.mark.slow
def test_what_is_in_the_engine_waits_until_it_is_woken(scheduler, harness):
    request = harness.submit(256)
    assert scheduler._turn() is None
    assert request.state is State.WAITING
    scheduler.asleep = False
    assert scheduler._turn()
    assert request.state is State.DENOISING


@pytest.mark.slow
def test_what_can_be_made_anew_goes_before_the_weights_do(scheduler):
    from sglang.multimodal_gen.runtime.entrypoints.post_training.io_struct import (
        ReleaseMemoryOccupationReqInput,
        ResumeMemoryOccupationReqInput,
    )

    done = []
    scheduler.asleep = False
    scheduler._executor = SimpleNamespace(
        release_memory=lambda: done.append("ours"), release_graphs=lambda: done.append("graphs")
    )

    def dispatch(payload):
        scheduler.asleep = isinstance(payload, ReleaseMemoryOccupationReqInput)
        done.append("asleep" if scheduler.asleep else "awake")
        return SimpleNamespace(error=None)

    scheduler._dispatch_single_request = dispatch
    scheduler._accept(b"", ReleaseMemoryOccupationReqInput())
    # SGLang empties the allocator's cache when the weights have gone.
    assert done[:2] == ["ours", "asleep"]
    done.clear()
    scheduler._accept(b"", ResumeMemoryOccupationReqInput())
    assert done == ["awake"]


def test_deadlines_pass_all_the_same(scheduler, harness):
    late, patient = harness.submit(256, deadline_s=0), harness.submit(256)
    (ended,) = scheduler._turn()
    assert ended.request is late
    assert patient.state is State.WAITING


def test_new_requests_are_refused(scheduler, harness):
    refused = []
    scheduler._submit(SimpleNamespace(request_id="x", failed=refused.append, ASLEEP="sleeping"))
    assert [error.code for error in refused] == ["engine_unavailable"]
    assert "sleeping" in str(refused[0])
    assert harness.engine.idle


def test_a_shutdown_does_not_wait_for_somebody_to_wake_it(scheduler, harness):
    harness.submit(256)
    assert not scheduler._finished()
    harness.engine.drain()
    assert scheduler._finished()
    scheduler.asleep = False
    assert not scheduler._finished(), "what is in the engine finishes first"
