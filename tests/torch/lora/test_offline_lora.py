"""Adapters by `krea2_srt.Krea2` and krea2-generate, as a user gives them."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from krea2_srt import Krea2
from krea2_srt.cli.generate import main
from krea2_srt.errors import AdapterError, ConfigError, RequestError
from krea2_srt.kernels.quantize import TokenFormat
from krea2_srt.lora.merge import merge
from krea2_srt.lora.reader import read_adapter
from krea2_srt.lora.rounding import Rounding
from krea2_srt.model.dit_files import load_dit
from krea2_srt.model.quantization import SERVED, Quantization
from krea2_srt.request import AdapterUse, ImageRequest
from krea2_srt.runner.model_runner import Krea2Runner
from tests.comparisons import CPU, PROMPT, psnr
from tests.torch.lora.forms import FORMS, random_pairs

UNKNOWN = frozenset({AdapterUse("d", "unknown")})
SMALL = {"size": (64, 48), "steps": 3, "seed": 5}


@pytest.fixture(scope="module")
def model(demo_model) -> Krea2:
    return Krea2.load(demo_model, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def files(config, tmp_path_factory) -> tuple[Path, Path]:
    """Different adapters, as Diffusers writes them."""
    found = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp(f"adapter-{seed}")
        found.append(FORMS[1].write(random_pairs(config, seed=seed), folder))
    return found[0], found[1]


def near(a: Image.Image, b: Image.Image) -> float:
    return psnr(*(torch.from_numpy(np.asarray(image) / 255) for image in (a, b)))


def diffusers_image(
    pipeline, path: Path, scale: float, prompt=PROMPT, size=(64, 48), steps=3, seed=5
) -> Image.Image:
    pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name="x")
    try:
        pipeline.set_adapters(["x"], [scale])
        return pipeline(
            prompt,
            width=size[0],
            height=size[1],
            num_inference_steps=steps,
            guidance_scale=0.0,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
    finally:
        pipeline.unload_lora_weights()


def test_a_picture_is_diffusers_with_the_same_file(model, files, diffusers_pipeline):
    (found,) = model.generate(PROMPT, lora={files[0]: 0.7}, **SMALL)
    (base,) = model.generate(PROMPT, **SMALL)
    expected = diffusers_image(diffusers_pipeline, files[0], 0.7)
    assert near(found, expected) >= 60
    assert near(found, base) < 30


def test_a_path_alone_is_scale_1(model, files):
    plain, scaled = (
        model.generate(PROMPT, lora=lora, **SMALL)[0] for lora in (files[0], {files[0]: 1})
    )
    assert plain.tobytes() == scaled.tobytes()


def test_requests_with_different_adapters_share_a_pack(model, files, monkeypatch):
    first, second = ({file: 1.0} for file in files)
    alone = [model.generate(PROMPT, lora=lora, **SMALL)[0] for lora in (first, second, None)]
    packs = []
    step = Krea2Runner.step

    def counted(self, states, steps=1):
        packs.append(len(states))
        return step(self, states, steps)

    monkeypatch.setattr(Krea2Runner, "step", counted)
    requests = [
        ImageRequest(PROMPT, 64, 48, 3, seed=5, adapters=model.load_lora(lora))
        for lora in (first, second, {})
    ]
    images = list(model.images(requests))
    assert packs == [3, 3, 3]
    for image, expected in zip(images, alone, strict=True):
        assert near(Image.fromarray(image), expected) >= 60


def test_a_file_is_read_once_and_again_when_it_changes(model, files, tmp_path, monkeypatch):
    from krea2_srt.lora import pool

    read = []
    monkeypatch.setattr(pool, "read_adapter", lambda *a: read.append(a) or read_adapter(*a))
    file = tmp_path / "changing.safetensors"
    shutil.copy(files[0], file)
    before, again = (model.generate(PROMPT, lora=file, **SMALL)[0] for _ in range(2))
    assert len(read) == 1
    assert before.tobytes() == again.tobytes()
    shutil.copy(files[1], file)
    (after,) = model.generate(PROMPT, lora=file, **SMALL)
    assert len(read) == 2
    assert near(before, after) < 30
    (expected,) = model.generate(PROMPT, lora=files[1], **SMALL)
    assert after.tobytes() == expected.tobytes()


@pytest.mark.slow
def test_merged_is_beside(demo_model, model, files):
    merged = Krea2.load(demo_model, device="cpu", dtype="float32", lora_merge={files[0]: 0.7})
    (found,) = merged.generate(PROMPT, **SMALL)
    (beside,) = model.generate(PROMPT, lora={files[0]: 0.7}, **SMALL)
    assert near(found, beside) >= 60


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (7, "lora: must be a path, or scales by paths, got int"),
        ({1: 1.0}, "lora: must be scales by paths, got 1"),
        ({"x": float("nan")}, r"lora\['x'\]: must be a finite number, got nan"),
        ({"x": "1"}, r"lora\['x'\]: must be a finite number, got '1'"),
        ({"x": 10**400}, r"lora\['x'\]: must be between -10 and 10"),
        ({"x": 11}, r"lora\['x'\]: must be between -10 and 10, got 11"),
        (dict.fromkeys("abcde", 1.0), "lora: must be at most 4, got 5"),
    ],
)
def test_what_is_wrong_is_named(model, lora, message):
    with pytest.raises(RequestError, match=message):
        model.generate(PROMPT, lora=lora, **SMALL)


def test_the_same_adapter_under_two_names_is_refused(model, files, tmp_path):
    shutil.copy(files[0], tmp_path / "copy.safetensors")
    with pytest.raises(RequestError, match=r"copy\.safetensors and another one are the same"):
        model.load_lora({files[0]: 1.0, tmp_path / "copy.safetensors": 0.5})


def test_a_file_that_is_none_changes_nothing(model, files, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"PK\x03\x04 and more of a pickle")
    with pytest.raises(AdapterError, match=r"bad\.safetensors: this is a pickle"):
        model.generate(PROMPT, lora=tmp_path / "bad.safetensors", **SMALL)
    with pytest.raises(AdapterError, match=r"missing\.safetensors: there is no such file"):
        model.load_lora("missing.safetensors")


@pytest.fixture
def flags(demo_model, tmp_path, monkeypatch) -> list[str]:
    """Flags of krea2-generate, for `SMALL`."""
    monkeypatch.chdir(tmp_path)
    flags = ["--checkpoint", str(demo_model), "--dtype=float32", "--width=64", "--height=48"]
    return [*flags, "--steps=3", "--seed=5"]


def test_an_adapter_that_is_not_loaded_is_found_before_anything_is_generated(model):
    images = [ImageRequest(PROMPT, 64, 48, 3), ImageRequest(PROMPT, 64, 48, 3, adapters=UNKNOWN)]
    with pytest.raises(AdapterError, match="adapter d: it is not loaded"):
        model.images(images, pack=1)


def test_the_command_takes_adapters(flags, model, files, capsys):
    main([PROMPT, *flags, f"--lora={files[0]}:0.7", "--lora", str(files[1])])
    (expected,) = model.generate(PROMPT, lora={files[0]: 0.7, files[1]: 1.0}, **SMALL)
    assert Image.open("sample_0.png").tobytes() == expected.tobytes()
    assert capsys.readouterr().out.split() == ["sample_0.png"]


@pytest.mark.slow
def test_the_command_takes_adapters_in_int8(flags, demo_model, files):
    main([PROMPT, *flags, f"--lora={files[0]}:0.7", "--quantization", "int8"])
    int8 = Krea2.load(demo_model, device="cpu", dtype="float32", quantization="int8")
    (expected,) = int8.generate(PROMPT, lora={files[0]: 0.7}, **SMALL)
    assert Image.open("sample_0.png").tobytes() == expected.tobytes()


@pytest.mark.slow
def test_the_command_merges_adapters(flags, model, files):
    main([PROMPT, *flags, f"--lora-merge={files[0]}:0.7", f"--lora-merge={files[1]}"])
    (expected,) = model.generate(PROMPT, lora={files[0]: 0.7, files[1]: 1.0}, **SMALL)
    assert near(Image.open("sample_0.png"), expected) >= 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora=no.safetensors"], "--lora: no.safetensors does not exist, or cannot"),
        (["--lora-merge=no.safetensors:0.5"], "--lora-merge: no.safetensors does not exist"),
        (["--lora=a:1", "--lora=a:2"], "--lora: a is given twice"),
        (["--lora=a:x"], "--lora: a:x does not exist"),
        (["--lora=a:nan"], "--lora: the scale of a must be a finite number, got nan"),
        (["--lora=a:-11"], "--lora: the scale of a must be between -10 and 10, got -11"),
        ([f"--lora={name}" for name in "abcde"], "--lora: must be at most 4 adapters, got 5"),
        (["--lora=" + 300 * "a" + ":1"], "does not exist, or cannot be read"),
        (["--lora=a"], "adapter a: files of no ending are not read, only .safetensors"),
        (["--lora-merge=b"], "adapter b: files of no ending are not read, only .safetensors"),
    ],
)
def test_a_wrong_adapter_is_one_line_before_the_model_is_loaded(
    demo_model, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    for name in "abcde":
        Path(name).write_bytes(b"nothing")
    monkeypatch.setattr(Krea2, "load", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as exit_:
        main(["x", "--checkpoint", str(demo_model), *arguments])
    assert exit_.value.code == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("size", "dtype", "quantization", "least", "most"),
    [
        (1.0, torch.float32, None, 0.0, 1e-4),
        (1.0, torch.bfloat16, None, -0.01, 0.01),
        (1e-5, torch.bfloat16, None, 0.2, 1.0),
        (1.0, torch.float32, Quantization("fp8"), -0.05, 0.05),
        (1.0, torch.float32, Quantization("fp8", rotation=True), -0.05, 0.05),
        (1.0, torch.float32, Quantization("int8", rotation=True), -0.01, 0.01),
    ],
)
def test_what_rounding_loses_is_measured(
    config, demo_model, tmp_path, size, dtype, quantization, least, most
):
    pairs = {
        name: type(pair)(pair.down * size, pair.up, pair.alpha)
        for name, pair in random_pairs(config).items()
    }
    rounding = Rounding(dtype)
    adapter = read_adapter(FORMS[0].write(pairs, tmp_path), config)
    deltas = merge([(adapter, 1.0)], config, rounding)
    assert rounding.lost == 0
    load_dit(demo_model / "transformer", CPU, dtype, quantization, deltas)
    assert least <= rounding.lost <= most


def test_what_rounding_loses_depends_on_the_rotation_that_a_matrix_has():
    """In a row with an outlier little else is kept, unless it is rotated."""
    stored = 0.01 * torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    stored[:, 3] = 100.0
    update = 0.1 * torch.ones_like(stored)
    lost = {}
    for rotation in (0, 64, 256):
        rounding = Rounding(torch.float32)
        rounding.note(stored, stored + update, TokenFormat(torch.int8, rotation))
        lost[rotation] = rounding.lost
    assert lost[0] > 0.9
    assert abs(lost[256]) < 0.3


def test_in_int8_a_picture_has_its_adapter(model, files, demo_model):
    int8 = Krea2.load(demo_model, device="cpu", dtype="float32", quantization="int8")
    assert int8.runner.dit.quantization == SERVED["int8"]
    for lora in ({files[0]: 0.7}, None):
        (found,), (expected,) = (one.generate(PROMPT, lora=lora, **SMALL) for one in (int8, model))
        assert 30 < near(found, expected) < 60


def test_the_setting_merges_for_whoever_generates(demo_model, model, files, monkeypatch):
    monkeypatch.setenv("KREA2_SRT_LORA_MERGE", f"{files[0]}:0.7")
    merged = Krea2.load(demo_model, device="cpu", dtype="float32")
    (found,) = merged.generate(PROMPT, **SMALL)
    (beside,) = model.generate(PROMPT, lora={files[0]: 0.7}, **SMALL)
    assert near(found, beside) >= 60
    monkeypatch.setenv("KREA2_SRT_LORA_MERGE", "nope.safetensors")
    with pytest.raises(AdapterError, match=r"merged: adapter nope\.safetensors: there is no such"):
        Krea2.load(demo_model, device="cpu", dtype="float32")
    monkeypatch.setenv("KREA2_SRT_LORA_MERGE", f"{files[0]},{files[0]}:0.5")
    with pytest.raises(AdapterError, match=r"is the same as .*; give one, with its scale"):
        Krea2.load(demo_model, device="cpu", dtype="float32")
    monkeypatch.setenv("KREA2_SRT_LORA_MERGE", "a:20")
    with pytest.raises(ConfigError, match="KREA2_SRT_LORA_MERGE: the scale of a must be between"):
        Krea2.load(demo_model, device="cpu", dtype="float32")


def test_a_merge_that_is_lost_is_told(demo_model, config, tmp_path, caplog):
    pairs = {
        name: type(pair)(pair.down * 1e-5, pair.up, pair.alpha)
        for name, pair in random_pairs(config).items()
    }
    file = FORMS[0].write(pairs, tmp_path)
    with caplog.at_level(logging.WARNING):
        Krea2.load(demo_model, device="cpu", dtype="bfloat16", lora_merge=file)
    (line,) = (r.getMessage() for r in caplog.records if "merged" in r.getMessage())
    assert line.endswith("% of what was merged is lost in the rounding of the weights")


def test_a_config_beside_a_file_of_another_name_is_its_own(config, tmp_path):
    """As published folders of PEFT's have it; beside PEFT's own file it belongs to that one."""
    (form,) = (form for form in FORMS if form.name == "peft folder")
    folder = form.write(random_pairs(config), tmp_path)
    (file,) = folder.glob("*.safetensors")
    renamed = folder / "style.safetensors"
    shutil.copy(file, renamed)
    beside = read_adapter(renamed, config)
    file.unlink()
    alone = read_adapter(renamed, config)
    for linear, factors in alone.matrices.items():
        for factor, other in zip(factors, beside.matrices[linear], strict=True):
            # Alpha 2 of rank 4; without the config alpha is the rank.
            assert torch.allclose(2 * factor.up, other.up)


def test_an_alpha_that_files_do_not_say_can_be_given(config, tmp_path):
    pairs = random_pairs(config)
    silent = read_adapter(FORMS[1].write(pairs, tmp_path), config, alpha=8.0)
    plain = read_adapter(tmp_path / "adapter.safetensors", config)
    said = read_adapter(FORMS[0].write(pairs, tmp_path), config, alpha=8.0)
    for linear, factors in plain.matrices.items():
        assert torch.allclose(silent.matrices[linear][0].up, 2 * factors[0].up)
        assert torch.allclose(said.matrices[linear][0].up, 0.5 * factors[0].up)
