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
    defaults = {"lora_path": None, "lora_scale": 1.0, "lora_alpha": None, "lora_weight_name": None}
    return SimpleNamespace(**{**defaults, **given})


def test_the_file_or_the_one_of_a_folder_is_meant(adapter):
    from krea2_srt.sglang.adapters import adapters_of

    assert adapters_of(options()) == ()
    for path in (adapter, adapter.parent):
        found = adapters_of(options(lora_path=str(path), lora_scale=0.5, lora_alpha=2))
        assert found == (ScaledFile(adapter, 0.5, 2),)
    named = options(lora_path=str(adapter.parent), lora_weight_name=adapter.name)
    assert adapters_of(named) == (ScaledFile(adapter),)


@pytest.mark.parametrize(
    "given", [{"lora_path": "nope.safetensors"}, {"lora_weight_name": "other.safetensors"}]
)
def test_one_that_is_not_there_is_a_line_that_names_the_option(adapter, given):
    from krea2_srt.sglang.adapters import adapters_of

    with pytest.raises(AdapterError) as caught:
        adapters_of(options(**{"lora_path": str(adapter.parent), **given}))
    assert str(caught.value).startswith("--lora-path: ")
    assert len(str(caught.value).splitlines()) == 1


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
