"""The official client, unchanged: responses, streams, errors, retries."""

import asyncio
import base64
import io
import threading
import time
from types import SimpleNamespace

import httpx
import openai
import pytest
from PIL import Image

from krea2_server.errors import MAX_RETRY_AFTER_S
from krea2_srt.messages import EngineError
from tests.channel import wait_until
from tests.server.serving import serve


@pytest.fixture(scope="module")
def fake_server(shared_engine, tmp_path_factory):
    """One that lets no stream be silent for long."""
    flags = ["--engine-endpoints", shared_engine.endpoint, "--keepalive-s", "0.2"]
    with serve(tmp_path_factory.mktemp("talkative"), *flags) as server:
        yield server


def picture(image) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(image.b64_json)))


def test_images_come_back_with_what_is_known_of_them(fake_server, engine):
    before = int(time.time())
    response = fake_server.client().images.generate(
        prompt="a red fox", n=3, size="512x256", quality="low", user="u-1", extra_body={"seed": 7}
    )
    assert [picture(image).size for image in response.data] == [(512, 256)] * 3
    assert [picture(image).getpixel((0, 0)) for image in response.data] == [
        (seed, seed, seed) for seed in (7, 8, 9)
    ]
    assert (response.size, response.quality, response.background) == ("512x256", "low", "opaque")
    assert response.output_format == "png"
    assert response.safety_identifier == "u-1"
    after = time.time()
    assert before <= response.created <= after
    tokens = 3 * 32 * 16
    assert response.usage.output_tokens == response.usage.output_tokens_details.image_tokens
    assert response.usage.output_tokens == tokens
    assert response.usage.input_tokens_details.text_tokens == response.usage.input_tokens > 0
    assert response.usage.total_tokens == tokens + response.usage.input_tokens
    extra = response.model_extra
    assert (extra["seed"], extra["num_inference_steps"]) == (7, 4)
    assert extra["timings"] == {
        "queue_ms": 1.0,
        "encode_ms": 2.0,
        "denoise_ms": 30.0,
        "decode_ms": 4.0,
    }
    assert [image.model_extra["seed"] for image in response.data] == [7, 8, 9]
    assert not extra["prompt_truncated"]
    assert response.data[0].revised_prompt is None
    assert response._request_id.startswith("req_")


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_formats(fake_server, engine, output_format):
    response = fake_server.client().images.generate(
        prompt="x", size="64x64", output_format=output_format
    )
    assert picture(response.data[0]).format == output_format.upper()
    assert response.output_format == output_format


def test_compression_is_the_files_quality(fake_server, engine):
    fake_server.client().images.generate(
        prompt="x", size="64x64", output_format="jpeg", output_compression=30
    )
    assert engine.requests[-1].quality == 30


def test_an_image_can_come_as_a_url(fake_server, engine):
    response = fake_server.client().images.generate(
        prompt="x", n=2, size="64x64", response_format="url", output_format="webp"
    )
    for image in response.data:
        assert image.b64_json is None
        found = httpx.get(image.url)
        assert found.headers["content-type"] == "image/webp"
        assert Image.open(io.BytesIO(found.content)).size == (64, 64)


def test_a_seed_that_nobody_gave_is_told(fake_server, engine):
    first, second = (
        fake_server.client().images.generate(prompt="x", size="64x64") for _ in range(2)
    )
    assert first.model_extra["seed"] != second.model_extra["seed"]
    assert engine.requests[-1].image.seed == second.model_extra["seed"]


def test_a_long_prompt_is_read_as_far_as_it_goes_and_that_is_said(fake_server, engine):
    response = fake_server.client().images.generate(prompt="word " * 6400, size="64x64")
    assert response.model_extra["prompt_truncated"] is True
    assert response.usage.input_tokens == 512


def test_a_stream_has_previews_and_then_the_pictures(fake_server, engine):
    stream = fake_server.client().images.generate(
        prompt="x", n=2, size="64x64", stream=True, partial_images=3, extra_body={"seed": 5}
    )
    events = list(stream)
    partial = [e for e in events if e.type == "image_generation.partial_image"]
    completed = [e for e in events if e.type == "image_generation.completed"]
    assert events[-2:] == completed
    for image in range(2):
        mine = [e for e in partial if e.model_extra["image_index"] == image]
        assert [e.partial_image_index for e in mine] == [0, 1, 2]
        assert [e.model_extra["step"] for e in mine] == [2, 4, 6]
        assert all(picture(e).format == "PNG" for e in mine)
    assert [e.model_extra["image_index"] for e in completed] == [0, 1]
    assert [e.model_extra["seed"] for e in completed] == [5, 6]
    assert [picture(e).getpixel((0, 0)) for e in completed] == [(5, 5, 5), (6, 6, 6)]
    # An image's own each, so that they add up to what the request has cost.
    assert [e.usage.output_tokens for e in completed] == [16, 16]
    assert [e.usage.input_tokens for e in completed] == [5, 0]
    assert completed[0].size == "64x64"


def test_a_stream_without_previews_has_the_picture(fake_server, engine):
    stream = fake_server.client().images.generate(prompt="x", size="64x64", stream=True)
    assert [e.type for e in stream] == ["image_generation.completed"]


def test_a_silent_stream_is_kept_open_by_comments(fake_server, engine):
    engine.hold.set()
    threading.Timer(1.0, engine.hold.clear).start()
    url = f"{fake_server.url}/v1/images/generations"
    body = {"prompt": "x", "size": "64x64", "stream": True}
    with httpx.stream("POST", url, json=body, timeout=300) as response:
        lines = list(response.iter_lines())
    comments = [line for line in lines if line.startswith(": queued ahead=0")]
    assert len(comments) >= 3
    assert not any(line.startswith("id:") for line in lines)
    assert any(line.startswith("event: image_generation.completed") for line in lines)
    # The same, as the official client reads it.
    engine.hold.set()
    threading.Timer(0.6, engine.hold.clear).start()
    stream = fake_server.client().images.generate(prompt="x", size="64x64", stream=True)
    assert [e.type for e in stream] == ["image_generation.completed"]


def test_async(fake_server, engine):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{fake_server.url}/v1", api_key="x") as client:
            responses = await asyncio.gather(
                *(client.images.generate(prompt="x", size="64x64") for _ in range(20))
            )
            stream = await client.images.generate(
                prompt="x", size="64x64", stream=True, partial_images=1
            )
            return responses, [event.type async for event in stream]

    responses, events = asyncio.run(run())
    assert all(len(response.data) == 1 for response in responses)
    assert events == ["image_generation.partial_image", "image_generation.completed"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"size": "255"}, openai.BadRequestError, "size"),
        ({"n": 999}, openai.BadRequestError, "n"),
        ({"model": "dall-e-3"}, openai.NotFoundError, "model"),
        ({"background": "transparent"}, openai.BadRequestError, "background"),
        ({"quality": "4k"}, openai.BadRequestError, "quality"),
        ({"extra_body": {"output_path": "/etc"}}, openai.BadRequestError, "output_path"),
    ],
)
def test_mistakes_are_the_clients_exceptions(fake_server, engine, stream, fields, error, param):
    with pytest.raises(error) as caught:
        fake_server.client().images.generate(prompt="x", stream=stream, **fields)
    assert caught.value.param == param
    assert caught.value.code
    assert caught.value.request_id.startswith("req_")
    assert not engine.requests


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("code", "status", "error"),
    [
        ("queue_full", 429, openai.RateLimitError),
        ("engine_unavailable", 503, openai.InternalServerError),
        ("invalid_value", 400, openai.BadRequestError),
    ],
)
def test_a_refusal_of_the_engine_has_its_status(fake_server, engine, stream, code, status, error):
    engine.refuse = EngineError(code, "no", retry_after_s=3.2)
    with pytest.raises(error) as caught:
        fake_server.client().images.generate(prompt="x", size="64x64", stream=stream)
    assert caught.value.status_code == status


@pytest.mark.parametrize(
    ("code", "status", "retry"),
    [
        ("out_of_memory", 503, "false"),
        ("generation_failed", 500, "false"),
        ("deadline_exceeded", 504, "false"),
        ("cancelled", 499, "false"),
    ],
)
def test_a_failure_says_whether_to_try_again(fake_server, engine, code, status, retry):
    engine.error = EngineError(code, "it went wrong")
    response = fake_server.post(prompt="x", size="64x64")
    assert response.status_code == status
    assert response.headers["x-should-retry"] == retry
    assert response.json()["error"]["code"]


def test_a_failure_in_a_stream_is_an_event_that_the_client_raises(fake_server, engine):
    engine.step_s = 0.05
    engine.error = EngineError("out_of_memory", "cuda says no")
    stream = fake_server.client().images.generate(prompt="x", size="64x64", stream=True)
    with pytest.raises(openai.APIError, match="memory") as caught:
        list(stream)
    assert caught.value.code == "out_of_memory"


def test_the_client_tries_again_after_the_time_that_it_is_told(fake_server, engine, monkeypatch):
    engine.refuse = EngineError("queue_full", "full", retry_after_s=1.3)
    response = fake_server.post(prompt="x", size="64x64")
    assert response.status_code == 429
    assert response.headers["retry-after"] == "2"
    assert response.headers["retry-after-ms"] == "1300"
    assert response.headers["x-should-retry"] == "true"

    pauses = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        engine.refuse = None

    sleepless = SimpleNamespace(**{**vars(time), "sleep": pause})
    monkeypatch.setattr(openai._base_client, "time", sleepless)
    fake_server.client(max_retries=1).images.generate(prompt="x", size="64x64")
    assert pauses == [1.3]
    assert len(engine.requests) == 3


def test_a_very_long_wait_is_told_as_the_longest_that_clients_take(fake_server, engine):
    engine.refuse = EngineError("queue_full", "full", retry_after_s=9999.0)
    response = fake_server.post(prompt="x", size="64x64")
    assert float(response.headers["retry-after"]) == MAX_RETRY_AFTER_S


def test_closing_a_stream_cancels_its_request(fake_server, engine):
    engine.step_s = 0.2
    stream = fake_server.client().images.generate(
        prompt="x", size="64x64", stream=True, partial_images=3
    )
    next(iter(stream))
    stream.close()
    wait_until(lambda: engine.cancelled)
    assert engine.waiting == 0


def test_hanging_up_cancels_its_request(fake_server, engine):
    engine.hold.set()

    async def hang_up() -> None:
        async with openai.AsyncOpenAI(base_url=f"{fake_server.url}/v1", api_key="x") as client:
            request = asyncio.create_task(client.images.generate(prompt="x", size="64x64"))
            await asyncio.to_thread(wait_until, lambda: engine.waiting == 1)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)

    asyncio.run(hang_up())
    wait_until(lambda: engine.cancelled)
    assert engine.waiting == 0


def test_priority_and_deadline_reach_the_engine(fake_server, engine):
    fake_server.client().images.generate(
        prompt="x", size="64x64", extra_body={"priority": 3, "deadline_ms": 1500}
    )
    assert (engine.requests[-1].priority, engine.requests[-1].deadline_s) == (3, 1.5)


def test_models_are_listed_as_the_client_reads_them(fake_server, engine):
    client = fake_server.client()
    (model,) = client.models.list().data
    assert model.id == "krea-2-turbo"
    assert client.models.retrieve("krea-2-turbo").owned_by == "krea"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-image-2")
