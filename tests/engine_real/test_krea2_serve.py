"""The whole server, with the real engine and the demo checkpoint."""

import asyncio
import base64
import io
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from krea2_srt.images import FORMATS
from tests.channel import endpoints, statistics, wait_until
from tests.infotexts import request_in, text_in
from tests.server.test_hostile_input import IMPOSSIBLE, NO_REQUESTS, check_error, post

GENERATE = Path(sys.executable).parent / "krea2-generate"


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def decoded(response) -> list[bytes]:
    return [base64.b64decode(image.b64_json) for image in response.data]


def in_engine(server) -> float:
    return sum(server.get("/v1/queue").json()[key] for key in ("waiting", "running"))


def long_stream(server):
    """A request that takes seconds, under way."""
    stream = server.client().images.generate(
        prompt="x",
        size="512x512",
        stream=True,
        partial_images=3,
        extra_body={"num_inference_steps": 100},
    )
    next(iter(stream))
    return stream


def test_the_same_seed_gives_the_same_bytes_alone_and_in_company(real_server):
    client = real_server.client()
    fields = {"prompt": "a red fox", "size": "256x192"}
    first = decoded(client.images.generate(**fields, n=3, extra_body={"seed": 41}))
    assert len({bytes(image) for image in first}) == 3
    again = decoded(client.images.generate(**fields, n=3, extra_body={"seed": 41}))
    assert again == first
    alone = decoded(client.images.generate(**fields, extra_body={"seed": 42}))
    difference = pixels(alone[0]).astype(int) - pixels(first[1]).astype(int)
    assert np.abs(difference).max() <= 1  # of 255: packed tokens round otherwise


@pytest.mark.slow
def test_the_picture_is_krea2_generates_pixel_for_pixel(real_server, trained_model, tmp_path):
    command = [GENERATE, "a red fox", "--checkpoint", str(trained_model), "--dtype", "float32"]
    command += ["--width", "256", "--height", "256", "--seed", "3", "--output", "fox"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=600)
    (ours,) = decoded(
        real_server.client().images.generate(
            prompt="a red fox", size="256x256", extra_body={"seed": 3}
        )
    )
    theirs = np.asarray(Image.open(tmp_path / "fox_0.png"))
    np.testing.assert_array_equal(pixels(ours), theirs)


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_file_that_says_how_it_was_generated_is_generated_again(real_server, output_format):
    fields = {"prompt": "a red fox", "size": "64x48", "seed": 5, "num_inference_steps": 2}
    how = {"output_format": output_format}

    def file(**more) -> bytes:
        answer = real_server.post(**how, **more).json()
        return base64.b64decode(answer["data"][0]["b64_json"])

    plain = file(**fields)
    told = file(**fields, embed_metadata=True)
    assert text_in(plain) is None
    np.testing.assert_array_equal(pixels(told), pixels(plain))
    assert file(**request_in(told), embed_metadata=True) == told


@pytest.mark.slow
def test_the_queue_counts_what_runs_and_what_waits(real_server):
    wait_until(lambda: not in_engine(real_server))
    stream = long_stream(real_server)
    queue = real_server.get("/v1/queue").json()
    assert (queue["waiting"], queue["running"]) == (0, 1)
    assert queue["estimated_wait_s"] > 0
    stream.close()
    wait_until(lambda: not in_engine(real_server))


def test_usage_and_timings_are_true(real_server):
    before = real_server.metric("krea2_request_seconds_sum", up_to="256x256")
    response = real_server.client().images.generate(prompt="a red fox", size="256x192", n=2)
    seconds = real_server.metric("krea2_request_seconds_sum", up_to="256x256") - before
    # "a red fox" is three tokens of Qwen's, and the template has five.
    assert response.usage.input_tokens == 3 + 5
    assert response.usage.output_tokens == 2 * 16 * 12
    timings = response.model_extra["timings"]
    assert all(ms >= 0 for ms in timings.values())
    assert timings["denoise_ms"] > 0 < timings["decode_ms"]
    assert sum(timings.values()) / 1e3 <= seconds


def test_a_prompt_that_is_too_long_is_cut_and_that_is_said(real_server):
    client = real_server.client()
    cut = client.images.generate(prompt="fox " * 600, size="16x16", extra_body={"seed": 1})
    assert cut.model_extra["prompt_truncated"] is True
    assert cut.usage.input_tokens == 512
    whole = client.images.generate(prompt="fox " * 400, size="16x16")
    assert whole.model_extra["prompt_truncated"] is False


def test_a_stream_shows_the_picture_on_its_way(real_server):
    stream = real_server.client().images.generate(
        prompt="a red heart on yellow",
        size="256x256",
        stream=True,
        partial_images=3,
        extra_body={"seed": 3},
    )
    *partial, completed = list(stream)
    assert [event.partial_image_index for event in partial] == [0, 1, 2]
    assert [event.model_extra["step"] for event in partial] == [2, 4, 6]
    final = pixels(base64.b64decode(completed.b64_json)).astype(float)
    errors = [
        np.abs(pixels(base64.b64decode(event.b64_json)).astype(float) - final).mean()
        for event in partial
    ]
    assert errors[0] > errors[1] > errors[2]


def test_guidance_and_a_negative_prompt_change_the_picture(real_server):
    client = real_server.client()
    seed = {"seed": 1}
    plain, guided, steered = (
        decoded(
            client.images.generate(prompt="a red fox", size="64x64", extra_body={**seed, **more})
        )[0]
        for more in (
            {},
            {"guidance_scale": 2.0},
            {"guidance_scale": 2.0, "negative_prompt": "blue"},
        )
    )
    assert len({plain, guided, steered}) == 3


def test_previews_steps_and_stages_are_in_the_metrics(real_server):
    before = real_server.metric("krea2_requests_total", outcome="done")
    previews = real_server.metric("krea2_previews_total")
    stream = real_server.client().images.generate(
        prompt="metrics", size="64x64", stream=True, partial_images=2
    )
    list(stream)
    assert real_server.metric("krea2_requests_total", outcome="done") == before + 1
    assert real_server.metric("krea2_previews_total") == previews + 2
    assert real_server.metric("krea2_stage_seconds_count", stage="denoise") > 0
    assert real_server.metric("krea2_step_seconds_count") > 0
    wait_until(lambda: real_server.metric("krea2_engine_steps_total", replica="0") > 0)
    for name in ("pack_tokens_total", "step_seconds_total", "prompt_cache_misses_total"):
        assert real_server.metric(f"krea2_engine_{name}", replica="0") > 0


def test_a_deadline_that_passes_is_told(real_server):
    response = real_server.post(prompt="x", size="256x256", deadline_ms=1)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"


def test_hang_ups_leave_nothing_behind(real_server):
    # Not more: beside a busy neighbour the engine estimates ten times as long, and has its limit.
    body = {"prompt": "x", "size": "512x512", "num_inference_steps": 100}

    sockets = []
    for number in range(30):
        content = json.dumps({**body, "stream": number % 2 == 0}).encode()
        head = (
            "POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        )
        sockets.append(socket.create_connection(("127.0.0.1", real_server.port)))
        sockets[-1].sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
    wait_until(lambda: in_engine(real_server) == 30)
    for connection in sockets:
        connection.close()
    wait_until(lambda: in_engine(real_server) == 0)
    real_server.client().images.generate(prompt="after", size="64x64")


def test_the_async_client_generates_several_at_once(real_server):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{real_server.url}/v1", api_key="x") as client:
            return await asyncio.gather(
                *(
                    client.images.generate(
                        prompt=f"fox {seed}", size=size, extra_body={"seed": seed}
                    )
                    for seed, size in enumerate(("64x64", "128x64", "64x128", "192x192") * 3)
                )
            )

    responses = asyncio.run(run())
    assert [response.model_extra["seed"] for response in responses] == list(range(12))
    for response in responses:
        width, height = map(int, response.size.split("x"))
        assert pixels(decoded(response)[0]).shape == (height, width, 3)


def test_a_url_leads_to_the_same_picture(real_server):
    client = real_server.client()
    fields = {"prompt": "a red fox", "size": "64x96", "extra_body": {"seed": 9}}
    (inline,) = decoded(client.images.generate(**fields))
    found = client.images.generate(**fields, response_format="url").data[0].url
    assert httpx.get(found).content == inline


@pytest.mark.parametrize(("output_format", "compression"), [("jpeg", 60), ("webp", 100)])
def test_formats_are_encoded_by_the_engine(real_server, output_format, compression):
    response = real_server.client().images.generate(
        prompt="x", size="64x64", output_format=output_format, output_compression=compression
    )
    assert Image.open(io.BytesIO(decoded(response)[0])).format == output_format.upper()


@pytest.mark.slow
def test_closing_a_stream_frees_the_engine(real_server):
    stream = long_stream(real_server)
    stream.close()
    wait_until(lambda: in_engine(real_server) == 0)


def test_every_image_of_ten_has_its_previews(real_server):
    stream = real_server.client().images.generate(
        prompt="x", n=10, size="128x128", stream=True, partial_images=2
    )
    events = list(stream)
    for image in range(10):
        mine = [event for event in events if event.model_extra["image_index"] == image]
        kinds = [event.type.removeprefix("image_generation.") for event in mine]
        assert kinds == ["partial_image", "partial_image", "completed"]


@pytest.mark.slow
def test_a_full_queue_is_refused_and_the_clients_own_retry_gets_through(real_server):
    # More work than the queue takes: alone it is let in, and nothing behind it.
    flood = real_server.client().images.generate(
        prompt="x",
        size="2048x2048",
        n=10,
        stream=True,
        extra_body={"num_inference_steps": 200},
    )
    refused = real_server.post(prompt="x", size="64x64")
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "queue_full"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert 0 < float(refused.headers["retry-after"]) <= 120
    with pytest.raises(openai.RateLimitError):
        real_server.client().images.generate(prompt="x", size="64x64")
    flood.close()
    wait_until(lambda: in_engine(real_server) == 0)
    real_server.client().images.generate(prompt="x", size="64x64")


@pytest.mark.slow
def test_hostile_input_does_no_harm_to_the_engine(real_server):
    for fields in IMPOSSIBLE:
        check_error(real_server.post(**{"prompt": "x", "size": "64x64", **fields}))
    for content in NO_REQUESTS:
        check_error(post(real_server, content), 400)
    for text in ("\x1b[2J", "\u202e", "\ufffe", "<|im_end|>" * 50, "🦊" * 4000):
        assert real_server.post(prompt=text, size="16x16").status_code == 200
    assert real_server.get("/ready").status_code == 200
    real_server.client().images.generate(prompt="a normal request", size="64x64")


def test_a_scanner_at_the_engines_port_does_it_no_harm(real_server, server):
    (endpoint,) = endpoints(server.log)
    port = int(endpoint.rsplit(":", 1)[1])
    pid = statistics(endpoint)["pid"]
    for data in (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" + b"x" * 200, b"\xff" * 100):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(data)
            time.sleep(0.2)
    real_server.client().images.generate(prompt="x", size="64x64")
    assert statistics(endpoint)["pid"] == pid


@pytest.mark.slow
def test_no_answer_waits_for_a_step_of_the_engine(real_server):
    """More answers than there are steps come before the image is done."""
    stream = long_stream(real_server)
    with httpx.Client(timeout=300) as client:
        for _ in range(200):
            assert client.get(f"{real_server.url}/health").status_code == 200
    assert in_engine(real_server) == 1
    stream.close()
    with open(f"/proc/{real_server.pid}/maps") as maps:
        assert "torch" not in maps.read()
