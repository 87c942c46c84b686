"""Every option that our runner does not honour is left to SGLang's own implementation."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from krea2_srt.errors import ConfigError
from krea2_srt.model.quantization import SERVED, Quantization
from krea2_srt.runner.config import RunnerConfig
from krea2_srt.sglang import launch

# SGLang resolves some options by what else is set; each test starts from a clean slate.
UNSUPPORTED = {
    "--lora-scale 0.5": "--lora-scale",
    "--num-gpus 2": "--num-gpus",
    "--num-gpus 2 --tp-size 2": "--tp-size",
    "--num-gpus 2 --sp-degree 2": "--sp-degree",
    "--num-gpus 2 --ulysses-degree 2": "--ulysses-degree",
    "--num-gpus 2 --ring-degree 2": "--ring-degree",
    "--num-gpus 2 --enable-cfg-parallel": "--enable-cfg-parallel",
    "--num-gpus 4 --dp-size 2": "--num-gpus",
    "--use-fsdp-inference": "--use-fsdp-inference",
    "--cache-dit-config cache.yaml": "--cache-dit-config",
    "--enable-cache-dit": "--enable-cache-dit",
    "--enable-teacache": "--enable-teacache",
    "--dit-layerwise-offload": "--dit-layerwise-offload",
    "--layerwise-offload-components dit": "--layerwise-offload-components",
    "--dit-cpu-offload": "--dit-cpu-offload",
    "--vae-cpu-offload": "--vae-cpu-offload",
    "--cpu-offload-components dit": "--cpu-offload-components",
    "--component-residency dit=resident": "--component-residency",
    "--performance-mode memory": "--performance-mode",
    "--disagg-role encoder": "--disagg-role",
    "--quantization mxfp8": "--quantization",
    "--quantization convrot_int8 --enable-teacache": "--enable-teacache",
    "--scheduler-path {model}/scheduler": "--component-paths",
    "--vocoder-weights-path x.safetensors": "--component-weights-paths",
    "--pipeline-class-name FluxPipeline": "--pipeline-class-name",
    "--enable-torch-compile": "--enable-torch-compile",
    "--enable-breakable-cuda-graph": "--enable-breakable-cuda-graph",
    "--attention-backend torch_sdpa": "--attention-backend",
    "--return-trajectory-latents": "--return-trajectory-latents",
    "--num-frames 9": "--num-frames",
}

SUPPORTED = [
    "",
    "--num-gpus 1 --tp-size 1 --sp-degree 1",
    "--num-gpus 2 --dp-size 2",
    "--dit-layerwise-offload false",
    "--performance-mode speed",
    "--height 512 --width 512 --num-inference-steps 8 --seed 3 --num-outputs-per-prompt 2",
    "--guidance-scale 2 --negative-prompt y --save-output --output-path o --output-file-name a.png",
    "--dit-precision fp32 --vae-precision fp32 --text-encoder-precisions fp32 --vae-tiling",
    "--host 127.0.0.1 --port 31000 --log-level info --warmup-mode server --enable-metrics",
    "--batching-max-size 4 --batching-delay-ms 5",
    "--disable-conditioning-cache --vae-tiling false --quality exact",
    "--quantization fp8",
    "--quantization fp8 --quantization-ignored-layers 0.* 27.*",
    "--quantization int8",
    "--quantization convrot_int8 --quantization-ignored-layers 0.* 27.*",
    "--text-encoder-cpu-offload",
    "--lora-path some/lora",
    "--lora-path x --lora-scale 0.5 --lora-alpha 8 --lora-nickname y --lora-weight-name z",
    "--lora-path x --lora-merge-mode dynamic",
    "--pipeline-class-name Krea2Pipeline",
    "--transformer-path {model}/transformer --text-encoder-path {model}/text_encoder",
    "--vae-path {model}/vae --tokenizer-path {model}/tokenizer",
    "--transformer-weights-path {file}",
]


@pytest.fixture(scope="module")
def parse(demo_model: Path, original_file: Path):
    """SGLang's own parser of `sglang generate`: flags -> ServerArgs."""
    from sglang.multimodal_gen.runtime.entrypoints.cli.generate import (
        add_multimodal_gen_generate_args,
    )
    from sglang.multimodal_gen.runtime.server_args import ServerArgs
    from sglang.multimodal_gen.runtime.utils.argparse import FlexibleArgumentParser

    def parse(flags: str, model: Path = demo_model):
        argv = ["--model-path", str(model), "--prompt", "x"]
        argv += flags.format(model=demo_model, file=original_file).split()
        parser = add_multimodal_gen_generate_args(FlexibleArgumentParser())
        args, unknown = parser.parse_known_args(argv)
        return ServerArgs.from_cli_args(args, unknown, argv=argv)

    return parse


class FromSGLang(SimpleNamespace):
    """Stands in for SGLang's own pipeline, which would load the model."""


@pytest.fixture
def construct(parse, demo_model, monkeypatch):
    """Construct the registered pipeline; returns it and the warnings it logged."""
    from krea2_srt.sglang import pipeline

    warnings: list[str] = []
    monkeypatch.setattr(pipeline, "Krea2Pipeline", lambda *args: FromSGLang(args=args))
    monkeypatch.setattr(pipeline.Krea2RunnerPipeline, "__init__", lambda *args: None)
    monkeypatch.setattr(
        pipeline.logger, "warning", lambda text, *values: warnings.append(text % values)
    )

    def construct(flags: str, model: Path = demo_model):
        return pipeline.Krea2RunnerPipeline(str(model), parse(flags, model)), warnings

    return construct


@pytest.mark.parametrize("flags", UNSUPPORTED)
def test_sglangs_own_serves_and_one_warning_names_the_flag(construct, flags):
    built, warnings = construct(flags)
    assert isinstance(built, FromSGLang)
    assert len(warnings) == 1
    assert UNSUPPORTED[flags] in warnings[0]
    assert "SGLang's own Krea 2 implementation serves" in warnings[0]


@pytest.mark.parametrize("first", ["pipeline", "command"])
def test_sglangs_own_never_gets_our_word_for_int8(construct, parse, capsys, first):
    """It would end in a traceback: the line says what its own word is."""
    flags = "--quantization int8 --enable-teacache"
    if first == "pipeline":
        with pytest.raises(SystemExit):
            construct(flags)
        line = capsys.readouterr().err.splitlines()[-1].removeprefix("krea2-srt: error: ")
    else:
        with pytest.raises(ConfigError) as error:
            launch.check(parse(flags))
        line = str(error.value)
    assert line == (
        "--quantization: SGLang's own Krea 2, which --enable-teacache would need, does not know "
        "int8; its own is called convrot_int8"
    )


@pytest.mark.parametrize("flags", SUPPORTED)
def test_our_runner_serves_with_options_that_it_honours(construct, flags):
    from krea2_srt.sglang.pipeline import Krea2RunnerPipeline

    built, warnings = construct(flags)
    assert isinstance(built, Krea2RunnerPipeline)
    assert not warnings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SGLANG_CACHE_DIT_ENABLED", "true"),
        ("SGLANG_CACHE_DIT_ENABLED", "on"),
        ("SGLANG_DIFFUSION_CFG_GATE_STEP", "0.5"),
    ],
)
def test_environment_variables_count_too(construct, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    built, warnings = construct("")
    assert isinstance(built, FromSGLang)
    assert name in warnings[0]


@pytest.mark.parametrize("fits", [True, False])
def test_paging_that_sglang_chose_by_itself_counts_where_the_model_does_not_fit(
    construct, monkeypatch, fits
):
    from sglang.multimodal_gen.runtime.server_args import ServerArgs

    from krea2_srt.runner.builder import RunnerBuilder
    from krea2_srt.sglang.pipeline import Krea2RunnerPipeline

    def plan(self):
        if not fits:
            raise ConfigError("gpu_memory: 23.1 GiB are free")

    monkeypatch.setattr(RunnerBuilder, "plan", plan)
    monkeypatch.setattr(ServerArgs, "residency_mode", lambda self, name: "layerwise-offload")
    built, warnings = construct("")
    assert isinstance(built, Krea2RunnerPipeline if fits else FromSGLang)
    if not fits:
        assert "transformer layerwise-offload (gpu_memory: 23.1 GiB are free)" in warnings[0]


@pytest.fixture
def checkpoint(demo_model: Path):
    from krea2_srt.model.checkpoint import Krea2Checkpoint

    return Krea2Checkpoint.from_folder(demo_model)


def test_what_options_ask_of_the_runner(parse, checkpoint, monkeypatch):
    from krea2_srt.sglang.pipeline import make_builder

    builder = make_builder(checkpoint, parse(""))
    assert builder.quantization is None
    # One picture needs no warm-up.
    assert builder.config == RunnerConfig(warm_up_s=0.0)
    flags = "--quantization fp8 --quantization-ignored-layers 0.* *.ff.down"
    builder = make_builder(checkpoint, parse(f"{flags} --text-encoder-cpu-offload"))
    assert builder.quantization == Quantization("fp8", False, ("0.*", "*.ff.down"))
    assert builder.config.text_encoder == "offload"
    monkeypatch.setenv("KREA2_SRT_TEXT_ENCODER", "resident")
    monkeypatch.setenv("KREA2_SRT_MAX_TURN_MS", "50")
    builder = make_builder(checkpoint, parse("--disable-conditioning-cache"))
    assert builder.config.text_encoder == "resident"
    assert builder.engine.max_turn_ms == 50
    assert builder.caches.contexts == 0


@pytest.mark.parametrize("name", ["int8", "convrot_int8"])
def test_int8_by_our_name_and_by_sglangs(parse, checkpoint, name):
    from krea2_srt.sglang.pipeline import make_builder

    builder = make_builder(checkpoint, parse(f"--quantization {name}"))
    assert builder.quantization == SERVED["int8"] == Quantization("int8", rotation=True)
    flags = f"--quantization {name} --quantization-ignored-layers 0.* *.ff.down"
    builder = make_builder(checkpoint, parse(flags))
    assert builder.quantization == Quantization("int8", True, ("0.*", "*.ff.down"))


def test_who_serves_warms_up(parse, checkpoint):
    from krea2_srt.sglang.options import mark_as_server
    from krea2_srt.sglang.pipeline import make_builder

    assert make_builder(checkpoint, parse("--warmup-mode server")).config.warm_up_s > 0
    args = parse("")
    mark_as_server(args)
    assert make_builder(checkpoint, args).config.warm_up_s > 0


def test_an_option_nobody_has_thought_of_is_not_ignored(parse):
    from krea2_srt.sglang.options import unsupported_options

    args = parse("")
    args._explicit_arg_names.add("brand_new_feature")
    assert unsupported_options(args) == ["--brand-new-feature"]


@pytest.mark.parametrize("value", ["off", "OFF", "0", "false"])
def test_the_switch(monkeypatch, value):
    from sglang.multimodal_gen import registry

    from krea2_srt import plugin

    registered: list[type] = []
    monkeypatch.setattr(registry, "register_pipeline", lambda cls, **_: registered.append(cls))
    monkeypatch.setenv("KREA2_SRT", value)
    plugin.register()
    assert not registered
    monkeypatch.delenv("KREA2_SRT")
    plugin.register()
    assert [cls.__name__ for cls in registered] == ["Krea2RunnerPipeline"]


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("krea/Krea-2-Turbo", True),
        ("/models/krea-2-raw/", True),
        ("/cache/models--krea--krea-2-turbo/snapshots/0123", True),
        ("krea2pipeline", True),
        ("black-forest-labs/FLUX.1-Krea-dev", False),
        ("/data/krea2-srt/models/my-flux", False),
        ("/data/krea-2/models/my-flux", False),
        ("fluxpipeline", False),
        ("Qwen/Qwen-Image", False),
    ],
)
def test_which_models_are_krea2(name, ours):
    from krea2_srt.sglang.served import is_krea2

    assert is_krea2(name) is ours


@pytest.fixture
def registry(monkeypatch):
    """SGLang's registry with our plugin in it, until the test ends."""
    from sglang.multimodal_gen import registry

    from krea2_srt import plugin

    monkeypatch.delenv("KREA2_SRT", raising=False)
    for name in ("_PIPELINE_REGISTRY", "_PIPELINE_CONFIG_REGISTRY", "_CONFIG_REGISTRY"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    monkeypatch.setattr(registry, "_MODEL_NAME_DETECTORS", list(registry._MODEL_NAME_DETECTORS))
    plugin.register()
    yield registry
    registry._get_config_info.cache_clear()
    registry.get_model_info.cache_clear()


def test_the_registered_pipeline_is_ours_for_any_folder_name(registry, demo_model, tmp_path):
    """By the class name in model_index.json too, not only by the path."""
    elsewhere = tmp_path / "model"
    elsewhere.symlink_to(demo_model)
    for path in (demo_model, elsewhere):
        info = registry.get_model_info(str(path))
        assert info.pipeline_cls.__name__ == "Krea2RunnerPipeline"
        assert info.pipeline_config_cls.__name__ == "Krea2PipelineConfig"


def test_other_models_keep_their_own_config(registry, tmp_path):
    """Also below a folder whose name has Krea 2's in it."""
    folder = tmp_path / "krea2-srt" / "my-flux"
    for part in ("transformer", "vae"):
        (folder / part).mkdir(parents=True)
    index = {"_class_name": "FluxPipeline", "_diffusers_version": "0.42.1"}
    (folder / "model_index.json").write_text(json.dumps(index))
    info = registry.get_model_info(str(folder))
    assert "Krea2" not in f"{info.pipeline_cls}{info.pipeline_config_cls}{info.sampling_param_cls}"


@pytest.mark.parametrize("wrong", ["setting", "checkpoint"])
def test_what_is_wrong_at_the_start_is_one_line(
    parse, demo_model, tmp_path, monkeypatch, capsys, wrong
):
    from krea2_srt.sglang import pipeline

    folder = demo_model
    if wrong == "setting":
        monkeypatch.setenv("KREA2_SRT_ATTENTION", "fa9")
    else:
        folder = tmp_path
    built = object.__new__(pipeline.Krea2RunnerPipeline)
    built.model_path = str(folder)
    with pytest.raises(SystemExit) as ended:
        built.load_modules(parse(""))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("krea2-srt: error: ")
    assert ("fa9" if wrong == "setting" else "model_index.json") in line
