"""What the user can mend ends `sglang generate` and `sglang serve` with one line."""

import os
import subprocess
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from krea2_srt.sglang import commands, compat, launch
from tests.engine_real.conftest import SGLANG, environment

GENERATE = ["/usr/bin/sglang", "generate", "--prompt", "x"]
SERVE = ["sglang", "serve"]
PROGRAM = ["program.py", "generate"]


@pytest.fixture
def krea2(monkeypatch):
    """A generator of SGLang's, or its arguments, of a Krea 2 model."""
    monkeypatch.setattr(launch, "check", lambda server_args: None)
    for module in (commands, launch):
        monkeypatch.setattr(module, "serves_krea2", lambda server_args: server_args == "krea2")
    return SimpleNamespace(server_args="krea2")


def fail(error: Exception):
    def failing(*args: object, **kwargs: object) -> None:
        raise error

    return failing


def the_line(capsys) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    "error", [ValueError("height must be positive\nand more"), FileNotFoundError("no prompts.txt")]
)
def test_a_request_that_cannot_be_is_told_in_a_line(krea2, monkeypatch, capsys, error):
    monkeypatch.setattr("sys.argv", GENERATE)
    with pytest.raises(SystemExit) as ended:
        commands.generate(fail(error), krea2)
    assert ended.value.code == 2
    assert the_line(capsys) == f"krea2-srt: error: {str(error).splitlines()[0]}"


def test_what_is_no_mistake_of_the_users_keeps_its_frames(krea2, monkeypatch):
    monkeypatch.setattr("sys.argv", GENERATE)
    with pytest.raises(KeyError):
        commands.generate(fail(KeyError("a bug")), krea2)
    with pytest.raises(ValueError, match="another model"):
        commands.generate(fail(ValueError("another model")), SimpleNamespace(server_args="flux"))


def test_a_program_with_sglang_as_a_library_handles_its_errors_itself(krea2, monkeypatch):
    monkeypatch.setattr("sys.argv", PROGRAM)
    with pytest.raises(ValueError, match="height"):
        commands.generate(fail(ValueError("height")), krea2)
    with pytest.raises(RuntimeError, match="exit code 2"):
        launch.launch(fail(RuntimeError("worker exited (exit code 2).")), "krea2")


@pytest.mark.parametrize("argv", [GENERATE, SERVE])
def test_who_waited_for_a_worker_that_said_why_says_no_more(krea2, monkeypatch, capsys, argv):
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as ended:
        launch.launch(fail(RuntimeError("worker exited (exit code 2).")), "krea2")
    assert ended.value.code == 2
    assert capsys.readouterr().err == ""
    with pytest.raises(RuntimeError, match="exit code 1"):
        launch.launch(fail(RuntimeError("worker exited (exit code 1).")), "krea2")


def test_sglang_still_says_how_a_worker_has_ended():
    # Read, not imported, which takes half a minute.
    spec = find_spec(compat.LAUNCH.rpartition(".")[0])
    assert "(exit code {process.exitcode})" in Path(spec.origin).read_text()


@pytest.mark.parametrize(
    "error", [ValueError("no source"), FileNotFoundError("not there"), SafetensorError("cut short")]
)
def test_an_adapter_that_cannot_be_read_is_told_with_its_option(monkeypatch, capsys, error):
    from krea2_srt.sglang import pipeline

    monkeypatch.setattr(pipeline, "unsupported_options", lambda server_args: ["--lora-path"])
    monkeypatch.setattr(pipeline, "Krea2Pipeline", fail(error))
    parts = {"component_paths": {}, "component_weights_paths": {}}
    arguments = SimpleNamespace(
        model_subfolder="x", quantization=None, transformer_weights_path=None, **parts
    )
    with pytest.raises(SystemExit) as ended:
        pipeline.Krea2RunnerPipeline("/models/krea-2", arguments)
    assert ended.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    said = f"krea2-srt: error: SGLang's own Krea 2 does not start with --lora-path: {error}"
    assert line == said


@pytest.mark.slow
def test_sglang_generate_with_an_adapter_that_is_not_there(demo_model):
    command = [SGLANG, "generate", "--model-path", str(demo_model), "--prompt", "x"]
    ended = subprocess.run(
        [*command, "--lora-path", "nope.safetensors"],
        env={**os.environ, **environment("on")},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("krea2-srt: error: ") == 1
    assert "--lora-path: Weight source 'nope.safetensors' is neither" in ended.stderr
