"""A small request does not wait for a big one's image.

Alone with one image of 2048 x 2048 that has steps to do, its first step starts within one turn
and its own encode.
Ageing limits that where the work in progress is old: a request that arrived at b and has r
seconds of work left stays before a newcomer of w seconds at t as long as its key is smaller,

    b + STRETCH * r < t + STRETCH * w, which is r < (t - b) / STRETCH + w

so that the newcomer waits for at most a `STRETCH`-th of the other's age, and its own work, more.
"""

import pytest

from krea2_srt.engine.lifecycle import Request
from krea2_srt.engine.policy import STRETCH
from tests.unit.engine.fakes import H200, Arrival, Harness

TURN_S = 0.2
T256 = 256 + 64
ENCODE_S = H200.encode(64) / 1e3
SMALL_S = (8 * H200.step([T256]) + H200.encode(64) + H200.decode(256**2)) / 1e3


def serve(at: float, big: list[dict], **fake: object) -> tuple[Harness, Request]:
    """Big requests at 0 and a small one at a time, which may be within a turn."""
    harness = Harness(**fake)
    small = Arrival(at, {"size": 256, "request_id": "small"})
    harness.run([*(Arrival(0.0, {"size": 2048, **fields}) for fields in big), small])
    harness.check_empty()
    return harness, harness.ended["small"]


def wait(harness: Harness, small: Request, at: float) -> float:
    """Seconds until its first step."""
    return harness.steps(small)[0].start - at


@pytest.mark.parametrize("overlapped", [False, True])
def test_its_first_step_starts_within_a_turn_and_its_own_encode(overlapped):
    """Whenever it comes before the big one's last slice."""
    waits, latencies = [], []
    for at in [i * 0.041 for i in range(140)]:
        harness, small = serve(at, [{}], overlaps_decodes=overlapped)
        waits.append(wait(harness, small, at))
        latencies.append(harness.ended_at["small"] - at)
    print(f"wait at most {max(waits) * 1e3:.0f} ms, latency {max(latencies) * 1e3:.0f} ms")
    assert max(waits) <= TURN_S + ENCODE_S + 1e-9
    assert max(waits) > 0.1
    # An overlapped decode is looked after between turns, so its end is seen a turn later.
    assert max(latencies) <= (2 if overlapped else 1) * TURN_S + SMALL_S + 1e-9


@pytest.mark.parametrize("decode_slices", [1, 8])
def test_what_is_left_goes_first_only_where_it_is_less_than_its_own_work(decode_slices):
    """From the last slice on, a decode of 75 ms is less than the 84 ms of the newcomer."""
    waits = []
    for at in [5.7 + i * 0.007 for i in range(60)]:
        harness, small = serve(at, [{}], decode_slices=decode_slices)
        waits.append(wait(harness, small, at))
    assert max(waits) <= TURN_S + SMALL_S + ENCODE_S


@pytest.mark.parametrize(
    "big",
    [
        [{}, {}],
        [{}, {}, {}],
        [{"num_images": 3}],
        [{"guidance": 3.5}],
        [{"guidance": 3.5, "steps": 26}],
    ],
    ids=["two", "three", "n=3", "guidance", "Raw"],
)
def test_behind_work_in_progress_it_waits_for_a_part_of_its_age_at_most(big):
    waits = []
    number = 60
    work_s = sum(
        fields.get("num_images", 1)
        * fields.get("steps", 8)
        * (2 if "guidance" in fields else 1)
        * 0.75
        for fields in big
    )
    for at in [i * work_s / number for i in range(number)]:
        harness, small = serve(at, big)
        waits.append(wait(harness, small, at))
        assert waits[-1] <= TURN_S + at / STRETCH + SMALL_S + ENCODE_S
    print(f"wait at most {max(waits) * 1e3:.0f} ms of {work_s:.0f} s in progress")


def test_many_small_requests_at_once_each_wait_for_those_before_only():
    harness = Harness()
    number = 20
    arrivals = [Arrival(2.5, {"size": 256, "request_id": f"small{i}"}) for i in range(number)]
    harness.run([Arrival(0.0, {"size": 2048}), *arrivals])
    latencies = sorted(harness.ended_at[f"small{i}"] - 2.5 for i in range(number))
    for place, latency in enumerate(latencies, start=1):
        assert latency <= TURN_S + place * SMALL_S + number * ENCODE_S
