"""krea2-serve's own engine, killed at work."""

import os
import re
import signal
import threading
from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.channel import PATIENCE_S, listens_where_sglang_looks, wait_until
from tests.engine_real.test_krea2_serve import in_engine, long_stream
from tests.server.serving import Served, serve


@pytest.fixture
def real_server(trained_model, tmp_path) -> Iterator[Served]:
    flags = ["--model-path", str(trained_model), "--engine.max-queue-s", "2000"]
    with serve(tmp_path, *flags, timeout_s=600) as running:
        yield running


@pytest.mark.slow
def test_an_engine_that_dies_is_started_again_and_its_requests_get_an_answer(real_server):
    assert not listens_where_sglang_looks(engine_pid(real_server))
    stream = long_stream(real_server)
    answers: list[httpx.Response] = []
    fields = {"prompt": "x", "size": "512x512", "num_inference_steps": 100}
    plain = threading.Thread(target=lambda: answers.append(real_server.post(**fields)))
    plain.start()
    wait_until(lambda: in_engine(real_server) == 2)

    os.kill(engine_pid(real_server), signal.SIGKILL)
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "engine_unavailable"
    plain.join(PATIENCE_S)
    assert answers[0].status_code == 503
    assert answers[0].headers["x-should-retry"] == "true"

    assert real_server.get("/health").status_code == 200
    assert real_server.get("/ready").status_code == 503
    refused = real_server.post(prompt="x", size="64x64")
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "engine_unavailable"
    assert float(refused.headers["retry-after"]) > 0

    wait_until(lambda: real_server.get("/ready").status_code == 200, 600)
    real_server.client().images.generate(prompt="after", size="64x64")


def engine_pid(server) -> int:
    """Id of the scheduler process that the server has started last."""
    return int(re.findall(r"engine 0: starting, process (\d+)", server.log)[-1])
