"""The trained demo as ComfyUI's three files, its transformer in 8 bits, through every way in.

All formats in one of them; each of the others, which take a minute to start, with int8 served as
it is stored.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from krea2_srt import Krea2
from tests.dialects import write_fp8_scaled, write_gguf, write_int8
from tests.engine_real.conftest import SGLANG, START_TIMEOUT_S, environment
from tests.engine_real.test_krea2_serve import decoded, pixels
from tests.engine_real.test_right_pictures import SIZES, Server
from tests.server.serving import serve as krea2_serve
from tests.single_files import write_dit_file, write_text_encoder_file, write_vae_file
from tools.demo_model.evaluate import Score
from tools.demo_model.reading import draw_captions

pytestmark = pytest.mark.slow

GENERATE = Path(sys.executable).parent / "krea2-generate"
PROMPT, SEED, SIDE = "a red fox", 7, 192
FLOAT32 = [
    "--dit-precision",
    "fp32",
    "--vae-precision",
    "fp32",
    "--text-encoder-precisions",
    "fp32",
]
WRITERS = {"fp8_scaled": write_fp8_scaled, "int8_convrot": write_int8, "q8_0": write_gguf}


@dataclass(frozen=True)
class Files:
    transformer: Path
    text_encoder: Path
    vae: Path
    expected: np.ndarray
    """The picture of what the transformer's file means, as numbers in float32."""

    def picture(self, tokenizer: Path, quantization: str | None = None) -> np.ndarray:
        """What the library generates of the files."""
        return picture(self.transformer, self.text_encoder, self.vae, tokenizer, quantization)


def picture(
    transformer: Path,
    text_encoder: Path,
    vae: Path,
    tokenizer: Path,
    quantization: str | None = None,
) -> np.ndarray:
    model = Krea2.load(
        transformer,
        text_encoder=text_encoder,
        vae=vae,
        tokenizer=tokenizer,
        device="cpu",
        dtype="float32",
        quantization=quantization,
    )
    (image,) = model.generate(PROMPT, seed=SEED, size=(SIDE, SIDE))
    return np.asarray(image)


@pytest.fixture(scope="module")
def files(request, trained_model, tmp_path_factory) -> Files:
    folder = tmp_path_factory.mktemp("comfyui")
    text_encoder = write_text_encoder_file(
        trained_model / "text_encoder", folder / "qwen3vl_4b_bf16.safetensors", config=True
    )
    vae = write_vae_file(trained_model / "vae", folder / "qwen_image_vae.safetensors", config=True)
    plain = write_dit_file(trained_model / "transformer", folder / "plain.safetensors")
    ending = "gguf" if request.param == "q8_0" else "safetensors"
    transformer = folder / f"krea2_turbo_{request.param}.{ending}"
    meant = WRITERS[request.param](load_file(plain), transformer)
    twin = folder / "krea2_turbo_twin.safetensors"
    save_file(meant, twin)
    expected = picture(twin, text_encoder, vae, trained_model / "tokenizer")
    return Files(transformer, text_encoder, vae, expected)


def assert_near(found: np.ndarray, expected: np.ndarray) -> None:
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def run(command: list[object], folder: Path, **variables: str) -> np.ndarray:
    ended = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return np.asarray(Image.open(folder / "fox_0.png"))


@pytest.mark.parametrize("files", WRITERS, indirect=True, scope="module")
def test_krea2_generate(files, trained_model, tmp_path):
    command = [GENERATE, PROMPT, "--checkpoint", files.transformer, "--vae", files.vae]
    command += ["--text-encoder", files.text_encoder, "--tokenizer", trained_model / "tokenizer"]
    command += ["--width", SIDE, "--height", SIDE, "--seed", SEED]
    command += ["--dtype", "float32", "--output", "fox"]
    assert_near(run(command, tmp_path), files.expected)


@pytest.mark.parametrize("files", ["int8_convrot"], indirect=True, scope="module")
def test_sglang_generate(files, trained_model, tmp_path):
    command = [SGLANG, "generate", "--model-path", trained_model, "--prompt", PROMPT, *FLOAT32]
    command += ["--transformer-weights-path", files.transformer, "--vae-path", files.vae]
    command += ["--text-encoder-path", files.text_encoder, "--seed", SEED]
    command += ["--num-inference-steps", 8, "--height", SIDE, "--width", SIDE]
    command += ["--save-output", "--output-path", ".", "--output-file-name", "fox_0.png"]
    command += ["--quantization", "int8"]
    found = run(command, tmp_path, **environment("on"))
    assert_near(found, files.picture(trained_model / "tokenizer", "int8"))
    off = np.abs(found.astype(int) - files.expected.astype(int)).mean()
    assert 0 < off < 10


@pytest.mark.parametrize("files", ["int8_convrot"], indirect=True, scope="module")
def test_krea2_serve_draws_what_it_is_asked_for(files, trained_model, tmp_path):
    flags = ["--model-path", files.transformer, "--vae", files.vae]
    flags += ["--text-encoder", files.text_encoder, "--tokenizer", trained_model / "tokenizer"]
    flags += ["--sglang-args", " ".join(FLOAT32), "--engine.max-queue-s", "2000"]
    flags += ["--quantization", "int8"]
    with krea2_serve(tmp_path, *map(str, flags)) as server:
        assert server.get("/v1/models").json()["data"][0]["id"] == files.transformer.stem
        size, extra = f"{SIDE}x{SIDE}", {"seed": SEED, "num_inference_steps": 8}
        answer = server.client().images.generate(prompt=PROMPT, size=size, extra_body=extra)
        expected = files.picture(trained_model / "tokenizer", "int8")
        assert_near(pixels(decoded(answer)[0]), expected)
        asked = draw_captions(60, Random(2026), held_out=True)
        score = Server(server).score(nn.Identity(), asked, SIZES)
    assert score.reaches(Score(colour=0.95, shape=0.85, background=0.95)), score
