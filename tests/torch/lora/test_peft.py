"""Files that Diffusers and PEFT themselves write, and what their configs say of scales."""

import itertools
from pathlib import Path

import peft
import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from krea2_srt.lora.merge import merge
from krea2_srt.lora.peft_config import PeftConfig
from krea2_srt.lora.reader import read_adapter
from krea2_srt.model.dit_files import load_dit
from tests.comparisons import CPU, relative_error
from tests.torch.lora.oracle import inputs, with_adapter

BOUND = 2e-5
PATTERNS = {
    "one alpha": {},
    "rank-stabilised": {"use_rslora": True},
    "an alpha of its own": {
        "alpha_pattern": {"attn.to_q": 1, "transformer_blocks.1.ff.up": 7, "^img_in": 3}
    },
    "a rank of its own": {"rank_pattern": {"ff.down": 2, "attn.to_k": 6}, "use_rslora": True},
}


MODULES = ("transformer_blocks.0.attn.to_q", "blocks.0.attn.to_q", "attn.to_q", "to_q")
NAMES = ("q", "to_q", "attn.to_q", r"attn\.to_q", "n.to_q", "^attn.to_q", "^to_q", "0.attn.to_q")


@pytest.mark.parametrize("module", MODULES)
def test_a_pattern_is_of_the_modules_that_peft_takes_it_for(module):
    """Any two names, of which the first that fits counts."""
    for names in itertools.permutations(NAMES, 2):
        alphas = {name: 2.0 + number for number, name in enumerate(names)}
        config = PeftConfig.from_dict({"r": 1, "lora_alpha": 1, "alpha_pattern": alphas}, "model.")
        theirs = alphas.get(get_pattern_key(alphas, module), 1.0)
        assert config.scale(f"model.{module}", 1) == theirs, names


@pytest.fixture(params=PATTERNS, ids=str)
def transformer(request, diffusers_pipeline) -> torch.nn.Module:
    """A copy of Diffusers' with an adapter on each of its matrices."""
    modules = diffusers_pipeline.transformer.named_modules()
    linears = [name for name, module in modules if isinstance(module, torch.nn.Linear)]
    fields = PATTERNS[request.param]
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=linears, **fields)
    return with_adapter(diffusers_pipeline.transformer, config)


def merged_velocity(demo_model: Path, path: Path, config) -> torch.Tensor:
    deltas = merge([(read_adapter(path, config), 1.0)], config)
    return inputs().ours(load_dit(demo_model / "transformer", CPU, torch.float32, deltas=deltas))


def test_a_file_of_diffusers_is_what_peft_makes_of_it(
    transformer, diffusers_pipeline, config, demo_model, tmp_path
):
    diffusers_pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=peft.get_peft_model_state_dict(transformer, adapter_name="some"),
        transformer_lora_adapter_metadata=transformer.peft_config["some"].to_dict(),
    )
    velocity = merged_velocity(demo_model, tmp_path / "pytorch_lora_weights.safetensors", config)
    theirs = inputs().diffusers(diffusers_pipeline, transformer)
    assert relative_error(velocity, theirs) <= BOUND


def test_a_file_of_diffusers_transformer_alone_is_what_peft_makes_of_it(
    transformer, diffusers_pipeline, config, demo_model, tmp_path
):
    transformer.save_lora_adapter(tmp_path, adapter_name="some")
    velocity = merged_velocity(demo_model, tmp_path / "pytorch_lora_weights.safetensors", config)
    theirs = inputs().diffusers(diffusers_pipeline, transformer)
    assert relative_error(velocity, theirs) <= BOUND


def test_a_folder_of_peft_is_what_peft_makes_of_it(
    transformer, diffusers_pipeline, config, demo_model, tmp_path
):
    layers = peft.get_peft_model_state_dict(transformer, adapter_name="some")
    save_file(
        {f"base_model.model.{key}": tensor for key, tensor in layers.items()},
        tmp_path / "adapter_model.safetensors",
    )
    transformer.peft_config["some"].save_pretrained(tmp_path)
    velocity = merged_velocity(demo_model, tmp_path, config)
    theirs = inputs().diffusers(diffusers_pipeline, transformer)
    assert relative_error(velocity, theirs) <= BOUND
