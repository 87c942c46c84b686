"""krea2-serve --plan, in this process: what it prints, and that it loads nothing."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from krea2_server.cli import main
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.model.released import write_released_configs
from krea2_srt.runner import builder
from krea2_srt.runner.memory_sizes import GIB

TUNED = "someone/krea-2-turbo-tuned"
MODELLED = "modelled and not measured: "


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No settings from outside, no SGLang to import, and no weights to read."""
    for variable in os.environ:
        if variable.startswith("KREA2_"):
            monkeypatch.delenv(variable)
    monkeypatch.setitem(sys.modules, "sglang", None)

    def read(*args, **options):
        raise AssertionError("weights are read")

    monkeypatch.setattr("safetensors.torch.load_file", read)
    monkeypatch.setattr("krea2_srt.model.weights.load_weights", read)


@pytest.fixture
def planned(capsys):
    """What the command prints, by its flags; it ends with status 0."""

    def run(*flags: str) -> str:
        assert main(["--plan", *flags]) is None
        shown = capsys.readouterr()
        assert shown.err == ""
        return shown.out

    return run


@pytest.fixture
def refused(capsys):
    """The one line of a plan that cannot be."""

    def run(*flags: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main([*flags])
        assert ended.value.code == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("krea2-serve: error: ")
        assert shown.err.count("\n") == 1
        return shown.err

    return run


def test_the_released_model_needs_nothing_on_disk_and_no_network(planned, monkeypatch):
    monkeypatch.setattr(builder, "available_memory", lambda: 64 * GIB)
    text = planned("--gpu", "RTX 4070", "--quantization", "fp8")
    lines = text.splitlines()
    assert lines[0] == (
        "krea/Krea-2-Turbo (Turbo, bfloat16 with fp8) on 4070, 11.2 of 11.7 GiB free:"
    )
    assert "11 blocks resident, 17 streamed" in lines[1]
    assert sum(line.startswith("  given up: ") for line in lines) >= 6
    assert "  given up: CUDA graphs" in lines
    assert lines[-1].startswith(f"A picture of 8 steps, {MODELLED}512x512 ")
    assert lines[-1].count(" s") >= 3
    assert "2048x2048" in lines[-1]
    assert "of this machine" not in text


def test_the_configs_that_are_built_in_are_a_checkpoints(tmp_path):
    for distilled in (True, False):
        folder = tmp_path / str(distilled)
        write_released_configs(folder, distilled)
        assert Krea2Checkpoint.from_folder(folder).sampling.distilled is distilled


def test_raw_is_guided_in_52_steps(planned):
    turbo, raw = (planned("--gpu", "H200", "--model-path", f"oss_{n}") for n in ("turbo", "raw"))
    assert "(Raw, bfloat16)" in raw
    assert f"A picture of 52 steps, {MODELLED}" in raw

    def seconds(text: str) -> float:
        return float(text.split("1024x1024 ")[1].split()[0])

    assert seconds(raw) == pytest.approx(13 * seconds(turbo), rel=0.1)


def test_a_checkpoint_on_disk_is_planned_by_its_own_sizes(planned, demo_model, original_file):
    text = planned("--gpu", "3060", "--model-path", str(demo_model))
    assert "given up: " not in text
    assert "streamed" not in text
    parts = [f"--{part}={demo_model / part}" for part in ("vae", "tokenizer")]
    parts.append(f"--text-encoder={demo_model / 'text_encoder'}")
    single = planned(
        *("--gpu", "3060", "--model-path", str(original_file), "--recipe", "turbo"), *parts
    )
    assert single.splitlines()[1:] == text.splitlines()[1:]


def test_of_a_repo_only_configs_are_downloaded(model_hub, capsys):
    model_hub.repo = TUNED
    main(["--plan", "--gpu=L4", f"--model-path={TUNED}"])
    assert f"{TUNED} (Turbo, bfloat16) on L4" in capsys.readouterr().out
    assert model_hub.fetched
    assert all(file.endswith(".json") for file in model_hub.fetched)
    assert not any("tokenizer" in file for file in model_hub.fetched)


def test_the_flags_of_a_server_count(planned, tmp_path):
    def row(text: str, what: str) -> str:
        (line,) = (line for line in text.splitlines() if line.strip().startswith(what))
        return line

    plain = planned("--gpu", "H200")
    assert "256 at a time" in row(plain, "sequences")
    assert "16896" not in row(plain, "CUDA graphs")
    told = planned(
        *("--gpu", "H200", "--engine.max-active-sequences=20", "--runner.cuda-graphs=off"),
        *("--runner.gpu-memory-gib=60", "--engine.max-side=1024", f"--lora-dir={tmp_path}"),
        "--sglang-args=--text-encoder-cpu-offload --disable-conditioning-cache --webui",
    )
    assert "on H200, 60.0 of 139.8 GiB free:" in told
    assert "20 at a time" in row(told, "sequences")
    assert row(told, "CUDA graphs").endswith("none")
    assert "offloaded" in row(told, "text encoder")
    assert row(told, "adapters").split()[1] == "2.00"
    assert row(told, "caches").split()[1] == "1.25"
    assert "up to 1024x1024" in row(told, "decodes")
    assert "2048x2048" not in told
    assert "  not part of the plan: --webui of sglang_args" in told.splitlines()
    small = planned("--gpu", "H200", "--engine.max-side=256")
    assert small.endswith("No modelled picture is as small as the limits.\n")
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump({"runner": {"streamed_blocks": 3}}))
    assert "25 blocks resident, 3 streamed" in planned(
        "--gpu", "H200", f"--config={tmp_path / 'serve.yaml'}"
    )
    kept = planned(
        *("--gpu", "H200", "--quantization", "fp8"),
        "--sglang-args=--quantization-ignored-layers '*.down' --dit-precision fp16",
    )
    assert "float16 with fp8" in kept
    int8 = planned("--gpu", "H200", "--sglang-args=--quantization convrot_int8")  # SGLang's word
    assert int8 == planned("--gpu", "H200", "--quantization", "int8")
    fp8 = planned("--gpu", "H200", "--quantization", "fp8")
    assert float(row(kept, "transformer").split()[1]) > float(row(fp8, "transformer").split()[1])
    int8 = planned("--gpu", "H200", "--quantization", "int8")
    assert planned("--gpu", "H200", "--sglang-args=--quantization convrot_int8") == int8


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--plan", "--gpu", "Voodoo 2"], "gpu: must be one of 3060, 3090, .* got 'Voodoo 2'"),
        (["--gpu", "4090"], "gpu: has no effect without plan"),
        (["--plan", "--engine-endpoints=tcp://a:1"], "plan: has no effect with engine_endpoints"),
        (["--plan", "--gpu=A10", "--quantization=fp8"], "fp8 needs .* 8.6; it can have int8$"),
        (["--plan", "--gpu=A10", "--sglang-args=--revision"], "sglang_args: argument --revision"),
        (
            ["--plan", "--gpu=A10", "--sglang-args=--quantization nvfp4"],
            "quantization: must be one of int8, fp8, got 'nvfp4'",
        ),
        (["--plan", "--gpu=A10", "--model-path=./nothing"], "checkpoint ./nothing does not exist"),
        (["--plan", "--gpu=A10", "--lora-dir=./nothing"], "lora_dir: there is no folder nothing"),
        (
            ["--plan", "--gpu=3060", "--runner.streamed-blocks=0"],
            "gpu_memory: .* --quantization int8 halves the transformer; streamed_blocks auto",
        ),
        (["--plan", "--runner.streamed-blocks=some"], "runner.streamed_blocks: must be auto or a"),
    ],
)
def test_what_cannot_be_planned_is_one_line(refused, flags, named):
    assert re.search(named, refused(*flags))


def test_without_a_gpu_it_says_so_and_which_can_be_named(planned):
    text = planned()
    assert text.startswith("There is no GPU here: all would run on the CPU")
    assert "A100-40GB" in text


@pytest.fixture
def gpu_here(monkeypatch):
    """A 4090, as far as the plan can see, in a machine with 64 GiB to take."""
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(cuda, "mem_get_info", lambda device: (22 * GIB, 24 * GIB))
    monkeypatch.setattr(cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(builder, "available_memory", lambda: 64 * GIB)


def test_the_gpu_that_is_here_is_planned_with_what_is_free_of_it(
    gpu_here, planned, refused, monkeypatch
):
    text = planned()
    assert "on NVIDIA GeForce RTX 4090, 22.0 of 24.0 GiB free:" in text
    assert "streamed" in text
    assert MODELLED in text
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Next")
    assert planned().endswith("How long pictures take there is not modelled.\n")
    monkeypatch.setattr(builder, "available_memory", lambda: 8 * GIB)
    assert "host memory: 7.0 GiB can be taken, at least 1" in refused("--plan")


def test_it_says_where_this_machine_has_too_little_host_memory(planned, monkeypatch):
    monkeypatch.setattr(builder, "available_memory", lambda: 8 * GIB)
    text = planned("--gpu", "3060", "--replicas", "2")
    assert "host memory of this machine: 7.0 GiB can be taken, 2 engines need 5" in text


def test_no_file_is_left(planned, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    planned("--gpu", "H200")
    assert list(Path(tmp_path).iterdir()) == []
