"""The real engine, started once for all tests: `sglang serve`, and krea2-serve on its scheduler."""

import base64
import contextlib
import io
import json
import os
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

import tests.torch.interpreted_triton  # noqa: F401 (before anything else that imports Triton)
from krea2_srt.testing.processes import ChildProcess, ProcessError, free_ports, installed
from krea2_srt.threads import VARIABLES
from tests.channel import endpoints
from tests.server.serving import Served
from tests.server.serving import serve as krea2_serve

if TYPE_CHECKING:
    from krea2_srt.runner.model_runner import Krea2Runner

SGLANG = installed("sglang")
START_TIMEOUT_S = 600


def environment(switch: str, **more: str) -> dict[str, str]:
    # On a busy machine everything is estimated to take long; refusals have a test of their own.
    ours = {"KREA2_SRT": switch, "KREA2_SRT_MAX_QUEUE_S": "2000", "HF_HUB_OFFLINE": "1"}
    return {**ours, **more}


@dataclass
class Server:
    """A running `sglang serve`."""

    port: int
    process: ChildProcess

    @property
    def log(self) -> str:
        return self.process.log

    def post(self, timeout: float = 300, **fields: object) -> tuple[int, dict | str]:
        """POST /v1/images/generations; returns the status and the (JSON) body."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/images/generations",
            json.dumps(fields).encode(),
            {"content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def generate(self, **fields: object) -> list[np.ndarray]:
        """Pixels of a request that must succeed."""
        status, body = self.post(output_format="png", response_format="b64_json", **fields)
        assert status == 200, body
        return [
            np.asarray(Image.open(io.BytesIO(base64.b64decode(image["b64_json"]))))
            for image in body["data"]
        ]


@contextlib.contextmanager
def serve(model: Path, folder: Path, *flags: str, **variables: str) -> Iterator[Server]:
    """`sglang serve` with our runner in float32. It must end with exit code 0."""
    port = free_ports(["http"])["http"]
    # The engine's threads wait as at a user's who has not said how, and libgomp says how.
    command = ["env", *(f"--unset={name}" for name in VARIABLES), "OMP_DISPLAY_ENV=verbose"]
    command += [SGLANG, "serve", "--model-path", str(model), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dit-precision", "fp32", "--vae-precision", "fp32"]
    command += ["--text-encoder-precisions", "fp32", *flags]
    log = folder / "sglang-serve.log"
    variables = environment("on", **variables)
    with ChildProcess(command, log, folder=folder, environment=variables) as process:
        process.wait_until(lambda: _healthy(port), "it is healthy", START_TIMEOUT_S)
        yield Server(port, process)


@pytest.fixture(scope="session")
def turn_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the engine writes what it did."""
    return tmp_path_factory.mktemp("turns") / "turns.jsonl"


@pytest.fixture(scope="session")
def adapters_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the engine's adapters are; tests put their own into it."""
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="session")
def server(
    trained_model: Path,
    turn_log: Path,
    adapters_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    """SGLang's own HTTP server, with the engine that all tests share."""
    folder = tmp_path_factory.mktemp("serve")
    variables = {
        "KREA2_SRT_TURN_LOG": str(turn_log),
        "KREA2_SRT_LORA_DIR": str(adapters_folder),
    }
    with serve(trained_model, folder, **variables) as running:
        yield running


@pytest.fixture(scope="session")
def real_server(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """krea2-serve on the engine of `server`."""
    (endpoint,) = endpoints(server.log)
    folder = tmp_path_factory.mktemp("real-server")
    with krea2_serve(folder, "--engine-endpoints", endpoint) as running:
        yield running


@pytest.fixture(scope="session")
def runner(trained_model: Path) -> "Krea2Runner":
    """The engine's model, in this process."""
    import torch

    from krea2_srt.model.checkpoint import Krea2Checkpoint
    from krea2_srt.runner.model_runner import Krea2Runner

    checkpoint = Krea2Checkpoint.from_folder(trained_model)
    return Krea2Runner.load(checkpoint, torch.device("cpu"), torch.float32)


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return response.status == 200
    except urllib.error.HTTPError as error:
        # While it starts the body is empty; once an engine is lost, it never gets well again.
        if text := error.read().decode():
            raise ProcessError(f"sglang-serve: {text}") from None
        return False
    except OSError:
        return False


@pytest.fixture(scope="session")
def make_req(trained_model: Path):
    """Build a request the way SGLang's entry points do."""
    from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
    from sglang.multimodal_gen.runtime.entrypoints.utils import prepare_request
    from sglang.multimodal_gen.runtime.server_args import ServerArgs

    server_args = ServerArgs.from_kwargs(model_path=str(trained_model))

    def make(**fields):
        params = SamplingParams.from_user_sampling_params_args(
            str(trained_model), server_args=server_args, **{"prompt": "x", **fields}
        )
        return prepare_request(server_args=server_args, sampling_params=params)

    return make


@dataclass
class Generated:
    """What `sglang generate` left."""

    pictures: list[np.ndarray]
    log: str


@pytest.fixture(scope="session")
def sglang_generate(demo_model: Path, tmp_path_factory: pytest.TempPathFactory):
    """Run the real `sglang generate` with the README's flags, our runner on or off."""

    def generate(*flags: str, switch: str = "on") -> Generated:
        folder = tmp_path_factory.mktemp("generate")
        command = [SGLANG, "generate", "--model-path", str(demo_model), "--output-path", "out"]
        command += ["--num-inference-steps", "8", "--height", "256", "--width", "256"]
        result = subprocess.run(
            [*command, "--save-output", *flags],
            cwd=folder,
            env={**os.environ, **environment(switch)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=START_TIMEOUT_S,
            check=False,
        )
        assert result.returncode == 0, result.stdout[-3000:]
        files = sorted((folder / "out").glob("*"), key=lambda f: (f.stat().st_mtime_ns, f.name))
        return Generated([np.asarray(Image.open(f)) for f in files], result.stdout)

    return generate
