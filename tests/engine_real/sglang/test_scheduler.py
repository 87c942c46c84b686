"""The step scheduler inside the real SGLang engine, spoken to over its own channel."""

import contextlib
import http.client
import io
import json
import pickle
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from krea2_srt.messages import (
    Accepted,
    Cancel,
    Generated,
    GenerateRequest,
    GetStatistics,
    ProgressUpdate,
)
from krea2_srt.request import ImageRequest
from tests.channel import Channel, endpoints, statistics, wait_until
from tests.engine_real.test_sglang_serve import alone, assert_same

LARGE = {"width": 1024, "height": 1024, "num_inference_steps": 30}
SMALL = {"width": 64, "height": 64, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def endpoint(server):
    (found,) = endpoints(server.log)
    return found


@pytest.fixture
def channel(endpoint):
    with Channel(endpoint) as channel:
        yield channel


@pytest.fixture(autouse=True)
def nothing_is_left(endpoint):
    """Whatever a test does, the engine is empty and its counters balance afterwards."""
    yield
    after = wait_until(lambda: (s := statistics(endpoint)) and not s["requests"] and s)
    assert after["accepted"] == after["done"] + after["failed"] + after["cancelled"]
    assert after["waiting"] == after["active_sequences"] == after["paused_steps"] == 0
    assert after["outstanding_s"] == 0


@pytest.fixture
def req(make_req):
    """A request whose pixels come back as they are."""

    def make(request_id: str, **fields):
        made = make_req(
            **{"prompt": "x", "seed": 3, "save_output": False, "request_id": request_id, **fields}
        )
        made.return_file_paths_only = False
        return made

    return make


def busy(endpoint, steps: int = 1) -> bool:
    found = statistics(endpoint)
    return found["active_sequences"] > 0 and found["steps"] >= steps


@pytest.mark.parametrize("count", [8, pytest.param(20, marks=pytest.mark.slow)])
def test_mixed_requests_with_hang_ups_equal_each_alone(server, runner, req, endpoint, count):
    """Sizes, prompts, lengths, steps, seeds, n, guidance and arrival times are random."""
    random_ = random.Random(5)
    cases = [
        {
            "prompt": random_.choice(["x", "a blue house", "a red fox in the snow " * 9]),
            "width": 16 * random_.randint(2, 20),
            "height": 16 * random_.randint(2, 20),
            "num_inference_steps": random_.randint(1, 6),
            "seed": random_.randint(0, 2**40),
            "num_outputs_per_prompt": random_.choice([1, 1, 1, 2, 3]),
            "guidance_scale": random_.choice([1.0, 1.0, 1.0, 4.5]),
            "negative_prompt": "rain",
        }
        for _ in range(count)
    ]
    hung_up = set(random_.sample(range(count), count // 4))
    delays = [random_.uniform(0, 3) for _ in cases]

    def generate(index: int):
        time.sleep(delays[index])
        with Channel(endpoint) as channel:
            channel.send([req(f"mixed-{index}", **cases[index])])
            if index in hung_up:
                time.sleep(random_.uniform(0, 0.5))
                return None
            return channel.receive(600)

    with ThreadPoolExecutor(count) as pool:
        outputs = list(pool.map(generate, range(count)))
    for index, (case, output) in enumerate(zip(cases, outputs, strict=True)):
        if index in hung_up:
            continue
        assert output.error is None
        assert len(output.output) == case["num_outputs_per_prompt"]
        for i, pixels in enumerate(output.output):
            expected = alone(
                runner,
                case["prompt"],
                case["seed"] + i,
                case["width"],
                case["height"],
                case["num_inference_steps"],
                case["guidance_scale"] - 1,
                case["negative_prompt"],
            )
            assert_same(pixels, expected)


def test_a_small_request_overtakes_a_large_one(channel, endpoint, req):
    with Channel(endpoint) as large:
        large.send([req("large", **LARGE)])
        wait_until(lambda: busy(endpoint))
        assert channel.ask([req("small", **SMALL)]).error is None
        assert statistics(endpoint)["requests"] == 1, "the large one has ended too"
        large.send(Cancel("large"))
        # A cancel has no answer of its own, and SGLang's request has always one.
        assert large.receive().error == "the request was cancelled"
        with pytest.raises(TimeoutError):
            large.receive(0.1)


def test_a_cancelled_request_ends_within_a_step(channel, endpoint, req):
    before = statistics(endpoint)
    channel.send([req("abandoned", **LARGE)])
    wait_until(lambda: busy(endpoint, before["steps"] + 2))
    with Channel(endpoint) as other:
        other.send(Cancel("abandoned"))
        other.send(Cancel("abandoned"))  # which is not here any more
        at_cancel = other.ask(GetStatistics()).output
    output = channel.receive()
    assert output.error == "the request was cancelled"
    after = statistics(endpoint)
    assert not after["requests"]
    assert after["steps"] == at_cancel["steps"]
    assert after["cancelled"] == before["cancelled"] + 1


CLIENT = """
import sys, zmq
socket = zmq.Context().socket(zmq.REQ)
socket.connect(sys.argv[1])
socket.send(sys.stdin.buffer.read())
socket.recv()
"""


def test_the_work_of_a_killed_client_stops_within_a_step(endpoint, req):
    before = statistics(endpoint)
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT, endpoint], stdin=subprocess.PIPE
    ) as client:
        assert client.stdin
        client.stdin.write(pickle.dumps([req("abandoned", **LARGE)]))
        client.stdin.close()
        wait_until(lambda: busy(endpoint, before["steps"] + 2))
        client.kill()
    at_kill = statistics(endpoint)["steps"]
    after = wait_until(lambda: (s := statistics(endpoint)) and not s["requests"] and s)
    assert after["cancelled"] == before["cancelled"] + 1
    assert after["steps"] <= at_kill + 1, "more than the step under way was done"


def test_a_hung_up_http_client_frees_its_work(server, endpoint):
    before = statistics(endpoint)

    fields = {"prompt": "x", "size": "1024x1024", "num_inference_steps": 60, "seed": 1}
    path, headers = "/v1/images/generations", {"content-type": "application/json"}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port)) as connection:
        connection.request("POST", path, json.dumps(fields), headers)
        wait_until(lambda: busy(endpoint, before["steps"] + 1))
    after = wait_until(lambda: (s := statistics(endpoint)) and not s["requests"] and s)
    assert after["cancelled"] == before["cancelled"] + 1


def generate(request_id: str, width=64, height=64, steps=2, n=1, **fields) -> GenerateRequest:
    """As our images server asks."""
    image = ImageRequest("x", width=width, height=height, steps=steps, seed=3, num_images=n)
    return GenerateRequest(request_id, image, **fields)


def outcome(channel: Channel, message: GenerateRequest) -> Generated:
    """How a request ends."""
    answer = channel.ask(message)
    while not isinstance(answer, Generated):
        answer = channel.receive()
    return answer


def test_progress_and_previews(channel, runner):
    channel.send(generate("watched", 512, 384, 6, n=2, progress=True, previews=2))
    updates, answer = [], None
    assert channel.receive() == Accepted("watched")
    while answer is None:
        match channel.receive():
            case ProgressUpdate() as update:
                updates.append(update)
            case Generated() as answer:
                assert answer.error is None
    for index in range(2):
        mine = [update for update in updates if update.sequence == index]
        steps = [(u.step, u.total) for u in mine if u.preview is None]
        assert steps == [(step, 6) for step in range(1, 7)]
        previews = {u.step: u.preview for u in mine if u.preview is not None}
        assert set(previews) == {2, 4}
        for preview in previews.values():
            assert preview.shape == (192, 256, 3)
            assert preview.dtype == np.uint8
        pixels = np.asarray(Image.open(io.BytesIO(answer.images[index])))
        assert_same(pixels, alone(runner, "x", 3 + index, 512, 384, 6))


def test_control_requests_are_answered_between_steps(channel, endpoint, req, server):
    from sglang.multimodal_gen.runtime.entrypoints.control_requests import ListLorasReq

    with Channel(endpoint) as large:
        large.send([req("large", **LARGE)])
        wait_until(lambda: busy(endpoint))
        assert channel.ask(ListLorasReq()).output == {"loaded_adapters": [], "active": {}}
        assert channel.ask({"method": "ping"}).error == "Unknown request type: <class 'dict'>"
        assert channel.ask(GetStatistics()).output["requests"] == 1, "the large one has ended"


def test_an_engine_asleep_keeps_what_is_in_it(channel, endpoint, req, runner):
    from sglang.multimodal_gen.runtime.entrypoints.post_training.io_struct import (
        ReleaseMemoryOccupationReqInput,
        ResumeMemoryOccupationReqInput,
    )

    with Channel(endpoint) as sleeper:
        fields = {"width": 256, "height": 256, "num_inference_steps": 12}
        sleeper.send([req("sleeper", **fields)])
        wait_until(lambda: statistics(endpoint)["active_sequences"])
        answer = channel.ask(ReleaseMemoryOccupationReqInput())
        if answer.error or not (answer.output or {}).get("success", True):
            pytest.skip(f"SGLang cannot sleep here: {answer.error or answer.output}")
        assert "sleeping" in channel.ask([req("late", **SMALL)]).error
        channel.ask(ResumeMemoryOccupationReqInput())
        assert_same(sleeper.receive().output[0], alone(runner, "x", 3, 256, 256, 12))


def test_a_full_queue_refuses_with_an_estimate(channel, endpoint, req):
    with Channel(endpoint) as large:
        fields = {**LARGE, "num_inference_steps": 200, "num_outputs_per_prompt": 64}
        large.send([req("huge", **fields)])
        wait_until(lambda: statistics(endpoint)["requests"])
        assert "retry after" in channel.ask([req("refused", **SMALL)]).error
        error = outcome(channel, generate("refused")).error
        assert error.code == "queue_full"
        assert error.retry_after_s > 0


def test_a_deadline_ends_a_request(channel):
    error = outcome(channel, generate("late", 1024, 1024, 30, deadline_s=0.5)).error
    assert error.code == "deadline_exceeded"
    assert "deadline" in error.message


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"priority": 99}, "priority: must be between -10 and 10"),
        ({"deadline_s": -1}, "deadline_s"),
        ({"version": 99}, "version"),
        ({"previews": -1}, "previews"),
        ({"output_format": "bmp"}, "output_format"),
    ],
)
def test_bad_fields_of_our_own_messages_are_named(channel, fields, named):
    assert named in outcome(channel, generate("bad", **fields)).error.message


def test_messages_of_another_version_are_refused(channel):
    assert "version 99" in channel.ask(replace(GetStatistics(), version=99)).error


@pytest.mark.parametrize(
    "hostile",
    [
        {"output_path": 5},
        {"request_id": b"abc", "report_progress": True},
        {"extra": None},
        {"extra": None, "width": 7},
        {"metrics": "x"},
        {"guidance_scale": "x"},
        {"prompt": ["x"] * 10**5, "num_outputs_per_prompt": 64},
        {"prompt": []},
        {"prompt": "x" * 10**6},
        {"num_outputs_per_prompt": None},
        {"seed": "x"},
        {"width": None},
        {"profile": "x"},
        {"trace_ctx": 3},
        {"is_warmup": "x"},
        {"output_file_name": 3},
        {"data_type": 3},
    ],
    ids=lambda hostile: next(iter(hostile)),
)
def test_hostile_fields_hurt_nobody(channel, endpoint, req, hostile):
    made = req("hostile", **SMALL)
    for field, value in hostile.items():
        setattr(made, field, value)
    with Channel(endpoint) as other:
        other.send([made])
        assert channel.ask([req("fine", **SMALL)]).error is None
        if hostile.keys() & {"is_warmup", "trace_ctx"}:
            return  # harmless, or never answered
        other.receive()


def test_a_profiled_request_has_the_same_pictures(channel, req, runner):
    """It goes through SGLang's stages in place of the step scheduler."""
    fields = {**SMALL, "guidance_scale": 3.0, "negative_prompt": "rain", "profile": True}
    output = channel.ask([req("profiled", num_outputs_per_prompt=2, **fields)])
    assert output.error is None
    assert len(output.output) == 2
    for pixels, seed in zip(output.output, (3, 4), strict=True):
        assert_same(pixels, alone(runner, "x", seed, 64, 64, 2, 2.0, "rain"))
    assert channel.ask([req("the next", **SMALL)]).error is None


def test_grouped_requests_are_one(channel, req, runner):
    """As `sglang generate` sends several images."""
    group = [req(f"group-{i}", **{**SMALL, "seed": 30 + i}) for i in range(3)]
    output = channel.ask(group)
    assert output.error is None
    for i, pixels in enumerate(output.output):
        assert_same(pixels, alone(runner, "x", 30 + i, 64, 64, 2))


def test_a_picture_that_cannot_be_saved_fails_alone(channel, req, make_req):
    broken = make_req(prompt="x", output_path="/proc/nowhere", request_id="unsaved", **SMALL)
    assert channel.ask([broken]).error
    assert channel.ask([req("fine", **SMALL)]).error is None
