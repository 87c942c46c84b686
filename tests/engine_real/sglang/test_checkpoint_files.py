"""Single files and parts that are elsewhere, through SGLang's own options."""

import base64
import io
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from krea2_srt.convert.convert import convert_to_file
from krea2_srt.errors import CheckpointError, ConfigError
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.model.quantization import SERVED
from krea2_srt.sglang import launch, model_index
from krea2_srt.sglang.parts import is_krea2_on_disk, refuse_single_files, source_of
from tests.engine_real.conftest import SGLANG, START_TIMEOUT_S, environment
from tests.server.serving import serve as krea2_serve

CLASS = ["--pipeline-class-name", "Krea2Pipeline"]


@pytest.fixture(scope="module")
def unnamed_file(original_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose name says neither Krea 2 nor Turbo or Raw."""
    file = tmp_path_factory.mktemp("files") / "strawberry_mix.safetensors"
    file.symlink_to(original_file)
    return file


@pytest.fixture(scope="module")
def parse():
    """SGLang's own parser of `sglang generate`: flags -> ServerArgs."""
    from sglang.multimodal_gen.runtime.entrypoints.cli.generate import (
        add_multimodal_gen_generate_args,
    )
    from sglang.multimodal_gen.runtime.server_args import ServerArgs
    from sglang.multimodal_gen.runtime.utils.argparse import FlexibleArgumentParser

    def parse(*flags: object):
        argv = [*map(str, flags), "--prompt", "x"]
        parser = add_multimodal_gen_generate_args(FlexibleArgumentParser())
        args, unknown = parser.parse_known_args(argv)
        return ServerArgs.from_cli_args(args, unknown, argv=argv)

    return parse


@pytest.fixture
def registry(monkeypatch):
    """SGLang's registry, which remembers the last model that it was asked for."""
    from sglang.multimodal_gen import registry

    yield registry
    registry._get_config_info.cache_clear()
    registry.get_model_info.cache_clear()


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.setenv("KREA2_SRT_RECIPE", "turbo")


def parts_of(model: Path) -> list[object]:
    return ["--text-encoder-path", model / "text_encoder", "--vae-path", model / "vae"]


def test_a_single_file_is_ours_in_every_process(parse, unnamed_file, demo_model, recipe, registry):
    from krea2_srt.sglang.options import unsupported_options
    from krea2_srt.sglang.pipeline import find, make_builder
    from krea2_srt.sglang.served import serves_krea2

    args = parse("--model-path", unnamed_file, *CLASS, *parts_of(demo_model))
    assert serves_krea2(args)
    assert unsupported_options(args) == []
    launch.check(args)
    checkpoint = find(args.model_path, args)
    assert checkpoint.transformer == unnamed_file
    assert checkpoint.vae == demo_model / "vae"
    assert checkpoint.tokenizer == demo_model / "tokenizer"
    assert checkpoint.sampling.distilled
    assert make_builder(checkpoint, args).checkpoint is checkpoint


@pytest.mark.parametrize("flag", ["--transformer-weights-path", "--transformer-path"])
def test_a_transformer_in_place_of_the_models(parse, original_file, demo_model, flag):
    from krea2_srt.sglang.options import unsupported_options
    from krea2_srt.sglang.pipeline import find

    args = parse("--model-path", demo_model, flag, original_file)
    assert unsupported_options(args) == []
    assert find(args.model_path, args).transformer == original_file


def test_files_of_the_other_parts(parse, demo_model, original_file):
    """SGLang has names of its own for those."""
    flags = ["--vae-path", original_file, "--text-encoder-weights-path", original_file]
    args = parse("--model-path", demo_model, *flags)
    source = source_of(args.model_path, args)
    assert source.given == {"vae": str(original_file), "text_encoder": str(original_file)}
    with pytest.raises(ConfigError, match=r"^--vae-weights-path: has no effect beside"):
        source_of(
            "x",
            parse(
                *flags,
                "--model-path",
                demo_model,
                "--vae-path",
                demo_model / "vae",
                "--vae-weights-path",
                original_file,
            ),
        )


def test_what_sglangs_own_cannot_read_is_refused(parse, demo_model, unnamed_file, recipe, registry):
    args = parse("--model-path", unnamed_file, *CLASS, *parts_of(demo_model), "--enable-teacache")
    with pytest.raises(ConfigError) as error:
        refuse_single_files(args.model_path, args, ["--enable-teacache"])
    assert str(error.value) == (
        "--model-path: SGLang's own Krea 2, which --enable-teacache would need, cannot read the "
        f"single file {unnamed_file}"
    )
    args = parse("--model-path", demo_model, "--vae-path", unnamed_file)
    with pytest.raises(ConfigError, match=r"^--vae-path: .*cannot read the single file"):
        refuse_single_files(args.model_path, args, ["--enable-teacache"])
    refuse_single_files(str(demo_model), parse("--model-path", demo_model), ["--enable-teacache"])


def test_what_is_wrong_is_told_before_a_worker_starts(
    parse, unnamed_file, demo_model, registry, monkeypatch, capsys
):
    monkeypatch.setattr("sys.argv", ["sglang", "generate"])

    def started(*args: object) -> None:
        raise AssertionError("a worker was started")

    def the_line(*flags: object) -> str:
        args = parse("--model-path", unnamed_file, *CLASS, *flags)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            launch.launch(started, args)
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix("krea2-srt: error: ")

    said = the_line(*parts_of(demo_model))
    assert said.startswith(f"nothing says whether {unnamed_file} is Turbo or Raw: give --recipe")
    assert "KREA2_SRT_RECIPE" in said
    monkeypatch.setenv("KREA2_SRT_RECIPE", "raw")
    assert the_line("--vae-path", "/no/such") == "--vae-path: /no/such does not exist"
    # A program that has SGLang as a library gets the error itself.
    monkeypatch.setattr("sys.argv", ["program.py"])
    with pytest.raises(CheckpointError, match="/no/such"):
        launch.launch(started, parse("--model-path", demo_model, "--vae-path", "/no/such"))


@pytest.mark.parametrize("component", ["scheduler", "text-encoder-2"])
def test_a_component_that_only_sglang_has_is_its_business(
    parse, demo_model, original_file, component
):
    started: list[object] = []
    option = [f"--{component}-path", demo_model / "scheduler"]
    launch.launch(started.append, parse("--model-path", demo_model, *option))
    assert started
    args = parse("--model-path", demo_model, "--vae-path", original_file, *option)
    with pytest.raises(ConfigError, match=r"^--vae-path: .* cannot read the single file"):
        launch.launch(started.append, args)
    assert len(started) == 1


def test_the_diffusers_back_end_never_gets_what_is_ours(monkeypatch, unnamed_file, demo_model):
    """Where SGLang, before it knows of plugins, did not know either."""
    monkeypatch.setattr(launch, "serves_krea2", lambda server_args: False)
    incomplete = unnamed_file.parent / "incomplete"
    shutil.copytree(demo_model, incomplete, ignore=shutil.ignore_patterns("vae", "*.safetensors"))
    for path in (unnamed_file, incomplete):
        args = SimpleNamespace(model_path=str(path), _explicit_arg_names=set())
        with pytest.raises(CheckpointError, match="only with --pipeline-class-name Krea2Pipeline"):
            launch.check(args)
        # Who asks for it gets it.
        args._explicit_arg_names.add("backend")
        launch.check(args)
    launch.check(SimpleNamespace(model_path="black-forest-labs/FLUX", _explicit_arg_names=set()))


def test_sglang_reads_an_index_of_what_has_none(unnamed_file, demo_model, tmp_path):
    def original(name: str) -> None:
        raise ValueError(f"asked for {name}")

    assert model_index.read(original, str(unnamed_file))["_class_name"] == "Krea2Pipeline"
    incomplete = tmp_path / "model"
    incomplete.mkdir()
    shutil.copy(demo_model / "model_index.json", incomplete)
    assert model_index.read(original, str(incomplete))["_class_name"] == "Krea2Pipeline"
    for other in (demo_model / "vae", tmp_path / "nothing", "black-forest-labs/FLUX.1-dev"):
        with pytest.raises(ValueError, match="asked for"):
            model_index.read(original, str(other))


def test_a_path_that_is_not_there_is_one_line(monkeypatch, capsys):
    def original(name: str) -> None:
        raise ValueError("Repo id must be in the form 'repo_name'")

    with pytest.raises(ValueError, match="Repo id"):
        model_index.read(original, "/no/such")  # of a program with SGLang as a library
    monkeypatch.setattr("sys.argv", ["sglang", "serve"])
    with pytest.raises(SystemExit) as ended:
        model_index.read(original, "/no/such")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "krea2-srt: error: /no/such does not exist\n"


def test_which_files_are_krea2s(unnamed_file, demo_model, tmp_path):
    assert is_krea2_on_disk(str(unnamed_file))
    vae = demo_model / "vae" / "diffusion_pytorch_model.safetensors"
    assert not is_krea2_on_disk(str(vae))
    broken = tmp_path / "krea-2-turbo.safetensors"
    broken.write_bytes(b"\0")
    assert is_krea2_on_disk(str(broken))  # so that who loads it tells what is wrong
    assert not is_krea2_on_disk(str(tmp_path / "nothing"))


def test_sglangs_own_reader_knows_our_int8(demo_model, tmp_path):
    """Its config of ConvRot takes all markers, and its reader the shapes of values and scales."""
    from sglang.multimodal_gen.runtime.layers.quantization.configs.convrot_int8_config import (
        ConvRotInt8Config,
    )
    from sglang.multimodal_gen.runtime.utils.quantization_utils import (
        inspect_comfy_quant_markers,
        resolve_comfy_checkpoint_quantization,
    )

    model = Krea2Checkpoint.from_folder(demo_model)
    file = tmp_path / "int8.safetensors"
    convert_to_file(model.transformer, model.sampling, file, SERVED["int8"])
    markers = inspect_comfy_quant_markers([str(file)])
    assert len(markers) == 8 * 4
    assert all(marker["_is_rowwise"] for marker in markers.values())
    config = resolve_comfy_checkpoint_quantization(markers)
    assert isinstance(config, ConvRotInt8Config)
    assert set(config._serialized_group_sizes.values()) == {256}


@pytest.fixture(scope="module")
def of_the_folder(demo_model: Path) -> np.ndarray:
    """The picture of the folder that the file was made from, by the library."""
    from krea2_srt import Krea2

    model = Krea2.load(demo_model, device="cpu", dtype="float32")
    (picture,) = model.generate("a fox", size=(256, 256), steps=8, seed=7)
    return np.asarray(picture)


def assert_same(found: Image.Image, expected: np.ndarray) -> None:
    """Equal but for the last bit of a float32 sum, which may tip a pixel's rounding."""
    difference = np.abs(np.asarray(found).astype(int) - expected.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


@pytest.mark.slow
def test_sglang_generate_makes_the_same_picture_of_a_file(
    of_the_folder, demo_model, unnamed_file, tmp_path
):
    flags = ["--dit-precision", "fp32", "--vae-precision", "fp32", "--seed", "7"]
    flags += ["--text-encoder-precisions", "fp32", "--prompt", "a fox"]
    command = [SGLANG, "generate", "--model-path", unnamed_file, *CLASS, *parts_of(demo_model)]
    command += [*flags, "--num-inference-steps", "8", "--height", "256", "--width", "256"]
    command += ["--save-output", "--output-path", "out", "--output-file-name", "fox.png"]
    ended = subprocess.run(
        [str(part) for part in command],
        cwd=tmp_path,
        env={**os.environ, **environment("on", KREA2_SRT_RECIPE="turbo")},
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "our runner serves" in ended.stdout + ended.stderr
    assert_same(Image.open(tmp_path / "out" / "fox.png"), of_the_folder)


@pytest.mark.slow
def test_krea2_serve_makes_the_same_picture_of_a_file(
    of_the_folder, demo_model, unnamed_file, tmp_path
):
    precisions = ["--dit-precision", "fp32", "--vae-precision", "fp32"]
    precisions += ["--text-encoder-precisions", "fp32"]
    flags = ["--model-path", unnamed_file, "--recipe", "turbo", "--vae", demo_model / "vae"]
    flags += ["--text-encoder", demo_model / "text_encoder", "--engine.max-queue-s", "2000"]
    flags += ["--sglang-args", " ".join(precisions)]
    with krea2_serve(tmp_path, *map(str, flags)) as server:
        assert server.get("/v1/models").json()["data"][0]["id"] == "strawberry_mix"
        answer = server.post(prompt="a fox", size="256x256", seed=7, num_inference_steps=8).json()
    picture = base64.b64decode(answer["data"][0]["b64_json"])
    assert_same(Image.open(io.BytesIO(picture)), of_the_folder)


@pytest.mark.slow
def test_sglang_generate_with_a_file_that_it_does_not_know(original_file, tmp_path):
    file = tmp_path / "krea-2-mix.safetensors"
    file.symlink_to(original_file)
    ended = subprocess.run(
        [SGLANG, "generate", "--model-path", str(file), "--prompt", "x"],
        env={**os.environ, **environment("on")},
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
    )
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert "only with --pipeline-class-name Krea2Pipeline" in ended.stderr.splitlines()[-1]
