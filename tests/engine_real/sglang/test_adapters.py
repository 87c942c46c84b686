"""`sglang generate --lora-path` and its companions, on our runner."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from krea2_srt.errors import AdapterError
from krea2_srt.lora.scaled_files import ScaledFile
from tests.comparisons import PROMPT


@pytest.fixture(scope="module")
def adapter(demo_model: Path, tmp_path_factory) -> Path:
    """For the demo checkpoint; its files do not say their alpha."""
    from krea2_srt.model.dit_files import read_config
    from tests.torch.lora.forms import FORMS, random_pairs

    folder = tmp_path_factory.mktemp("adapter")
    return FORMS[1].write(random_pairs(read_config(demo_model / "transformer")), folder)


def options(**given: object) -> SimpleNamespace:
    """What of SGLang's arguments is read."""
    unset: dict[str, object] = dict.fromkeys(
        (
            "lora_path",
            "lora_alpha",
            "lora_weight_name",
            "quantization",
            "transformer_weights_path",
        )
    )
    unset |= {"component_paths": {}, "component_weights_paths": {}}
    return SimpleNamespace(**{**unset, "lora_scale": 1.0, "lora_merge_mode": "auto", **given})


def test_the_file_or_the_one_of_a_folder_is_meant(adapter):
    from krea2_srt.sglang.adapters import adapters_of

    assert adapters_of(options()) == ()
    for path in (adapter, adapter.parent):
        found = adapters_of(options(lora_path=str(path), lora_scale=0.5, lora_alpha=2))
        assert found == (ScaledFile(adapter, 0.5, 2),)
    named = options(lora_path=str(adapter.parent), lora_weight_name=adapter.name)
    assert adapters_of(named) == (ScaledFile(adapter),)


def test_a_mode_that_makes_no_difference_is_told(adapter, caplog):
    from krea2_srt.sglang.adapters import adapters_of

    assert adapters_of(options(lora_path=str(adapter), lora_merge_mode="dynamic"))
    assert "--lora-merge-mode dynamic: the adapter is merged all the same" in caplog.text


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"lora_path": "nope.safetensors"}, "--lora-path"),
        ({"lora_weight_name": "other.safetensors"}, "--lora-path"),
        ({"lora_path": "{file}", "lora_weight_name": "other.safetensors"}, "--lora-path"),
        ({"lora_path": "nobody/nothing"}, "--lora-path"),
        ({"lora_scale": float("nan")}, "--lora-scale"),
        ({"lora_scale": 1e6}, "--lora-scale"),
    ],
)
def test_what_cannot_be_is_a_line_that_names_the_option(adapter, monkeypatch, given, option):
    from huggingface_hub import constants

    from krea2_srt.sglang.adapters import adapters_of

    # Nobody listens there.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    path = given.get("lora_path", str(adapter.parent)).format(file=adapter)
    with pytest.raises(AdapterError) as caught:
        adapters_of(options(**{**given, "lora_path": path}))
    assert str(caught.value).startswith(f"{option}: ")
    assert len(str(caught.value).splitlines()) == 1


def test_a_setting_that_sglangs_own_would_ignore_ends_the_start(monkeypatch, capsys):
    from krea2_srt.sglang import pipeline

    monkeypatch.setenv("KREA2_SRT_LORA_MERGE", "x.safetensors")
    monkeypatch.setattr(pipeline, "unsupported_options", lambda server_args: ["--enable-teacache"])
    with pytest.raises(SystemExit) as ended:
        pipeline.Krea2RunnerPipeline("/models/krea-2", options(model_subfolder="x"))
    assert ended.value.code == 2
    assert "KREA2_SRT_LORA_MERGE: SGLang's own Krea 2 knows no" in capsys.readouterr().err


@pytest.mark.slow
def test_sglang_generate_is_what_the_library_generates(sglang_generate, demo_model, adapter):
    from krea2_srt import Krea2

    flags = [f"--{part}-precision=fp32" for part in ("dit", "vae")]
    flags += ["--text-encoder-precisions=fp32", "--prompt", PROMPT, "--seed", "5"]
    (found,) = sglang_generate(*flags, f"--lora-path={adapter}", "--lora-scale=0.5").pictures
    model = Krea2.load(demo_model, device="cpu", dtype="float32")
    with_it, base = (
        np.asarray(model.generate(PROMPT, size=(256, 256), steps=8, seed=5, lora=lora)[0], float)
        for lora in ({adapter: 0.5}, None)
    )
    # JPEG, of SGLang's own quality.
    assert np.abs(found - with_it).mean() < 4
    assert np.abs(found - base).mean() > 20
