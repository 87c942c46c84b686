"""What a graph captures is what ran before it, without a look at the device in between.

On meta tensors, which have no values: whatever reads one on the host raises.
"""

from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.pack import Segments
from krea2_srt.model.text_encoder import PREFIX_TOKENS, TextEncoder, empty_text_model
from krea2_srt.runner.attention import SDPA, AttentionBackend, AttentionChoice
from krea2_srt.runner.graphs import StepGraphs
from krea2_srt.runner.prompt_encoder import PromptEncoder
from tests.torch.runner.test_graphs import device_attention

META = torch.device("meta")
ON_DEVICE = AttentionChoice(SDPA, AttentionBackend("device", device_attention, True))


class Program(TorchDispatchMode):
    """Notes the operations that run, with the shapes and options that they run with."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        shown = [_shown(x) for x in args], {name: _shown(x) for name, x in kwargs.items()}
        self.operations.append((function, *shown))
        return function(*args, **kwargs)


def _shown(value):
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), tuple(value.stride()), value.dtype
    return [_shown(x) for x in value] if isinstance(value, list | tuple) else value


def program(function, capturing: bool) -> list[tuple]:
    """The operations of a function, as it believes to be captured or not."""
    believed = patch("torch.cuda.is_current_stream_capturing", lambda: True)
    with torch.inference_mode(), believed if capturing else nullcontext(), Program() as found:
        function()
    assert len(found.operations) > 50
    return found.operations


@pytest.fixture
def dit(runner) -> Krea2DiT:
    with torch.device("meta"):
        return Krea2DiT(runner.dit.config, torch.bfloat16)


@pytest.fixture
def encoder(runner) -> TextEncoder:
    """With positions that are real, as on a device."""
    original = runner.text_encoder
    config, layers = original.model.config, len(original.model.layers)
    model, _ = empty_text_model(config.to_dict(), layers, torch.bfloat16)
    return TextEncoder(model.eval(), original.tokenizer, original.select_layers, META)


def prompts(encoder, dit):
    """Encodes two prompts, padded or not."""
    whole = PromptEncoder(encoder, dit, ON_DEVICE)
    ids = torch.zeros(2, PREFIX_TOKENS + 30, dtype=torch.int64, device=META)
    kept = torch.zeros(60, dtype=torch.int64, device=META)
    segments = Segments(torch.zeros(5, dtype=torch.int32, device=META), (), 30)
    return lambda: whole.forward(ids, kept, segments)


def test_the_text_encoder_and_text_fusion_are_one_program(encoder, dit):
    encode = prompts(encoder, dit)
    assert program(encode, capturing=True) == program(encode, capturing=False)


def test_no_prompt_has_a_mask(encoder, dit):
    calls = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def noted(*args, **options):
        calls.append((options.get("attn_mask"), options.get("is_causal")))
        return sdpa(*args, **options)

    with patch("torch.nn.functional.scaled_dot_product_attention", noted), torch.inference_mode():
        encoder.states(torch.zeros(2, 50, dtype=torch.int64, device=META))
    assert calls == [(None, True)] * len(encoder.model.layers)


@pytest.mark.parametrize("capturing", [False, True])
def test_transformers_own_attention_would_be_noticed(encoder, dit, capturing):
    encode = prompts(encoder, dit)
    ours = program(encode, capturing)
    encoder.model.config._attn_implementation = "sdpa"
    if capturing:
        assert program(encode, capturing) != ours
    else:
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            program(encode, capturing)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_step_is_one_program(dit, steps):
    graphs = StepGraphs(dit, device_attention, lambda function: function, 400, max_segments=8)
    key = graphs._buckets.key([300] if steps > 1 else [100, 50, 90], steps)
    found = [program(lambda: graphs.forward(key), capturing) for capturing in (True, False)]
    assert found[0] == found[1]
