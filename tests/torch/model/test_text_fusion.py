"""Text fusion."""

import pytest
import torch

from krea2_srt.model import text_fusion
from krea2_srt.model.pack import Segments
from tests.comparisons import CPU


@pytest.mark.parametrize("at_once", [1, 5, 12, 29])
@torch.inference_mode()
def test_prompts_are_fused_the_same_in_parts(runner, monkeypatch, at_once):
    config = runner.dit.config
    prompts = Segments.of([12, 3, 14], CPU)
    generator = torch.Generator().manual_seed(0)
    shape = (29, config.num_text_layers, config.text_hidden_dim)
    hidden_states = torch.randn(shape, generator=generator)
    expected = runner.dit.fuse_text(hidden_states, prompts)
    monkeypatch.setattr(text_fusion, "TOKENS_AT_ONCE", at_once)
    found = runner.dit.fuse_text(hidden_states, prompts)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
