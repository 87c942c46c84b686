"""A field that docs/architecture.md adds in four places goes from a client to the pixels."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.new_field import ROOT, apply

PROGRAM = """
import dataclasses, json, sys
from pathlib import Path

import httpx

from krea2_srt import Krea2, messages
from krea2_srt.engine.cost import roofline
from krea2_srt.engine.engine import Engine
from krea2_srt.errors import RequestError
from krea2_srt.request import ImageRequest
from krea2_srt.runner.executor import RunnerExecutor
from krea2_srt.testing.fake_engine import FakeEngine
from krea2_srt.testing.krea2_serve import Krea2Serve

folder, model = Path(sys.argv[1]), Krea2.load(sys.argv[2], device="cpu", dtype="float32")
executor = RunnerExecutor(model.runner)
engine = Engine(executor, roofline())

def pixels(message):
    request = engine.submit(message.request_id, [message.image])
    while not request.ended:
        engine.turn()
    return executor.take_pixels(request.sequences[0])

found = {"version": messages.VERSION}
with FakeEngine() as fake, Krea2Serve(folder, ["--engine-endpoints", fake.endpoint]) as server:
    def send(**fields):
        body = {"prompt": "x", "size": "64x64", "num_inference_steps": 2, "seed": 3, **fields}
        return httpx.post(server.url + "/v1/images/generations", json=body)

    refused = send(noise_scale=9)
    found["refused"] = refused.status_code, refused.json()["error"]["param"]
    for fields in ({}, {"noise_scale": 1.0}, {"noise_scale": 0.5}):
        assert send(**fields).status_code == 200
    plain, same, other = map(pixels, fake.requests)
found["same"] = bool((plain == same).all())
found["other"] = bool((plain != other).any())
try:
    dataclasses.replace(fake.requests[0].image, noise_scale=9.0).check(model.limits)
except RequestError as error:
    found["checked"] = error.field
print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_new_field_goes_from_a_client_to_the_pixels(tmp_path, demo_model):
    from krea2_srt.messages import VERSION

    for package in ("krea2_srt", "server/krea2_server"):
        ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    apply(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "server-files"), str(demo_model)],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{tmp_path / 'server'}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found.pop("version") != VERSION, "an engine without the field would ignore it"
    assert found == {
        "refused": [400, "noise_scale"],
        "same": True,
        "other": True,
        "checked": "noise_scale",
    }
