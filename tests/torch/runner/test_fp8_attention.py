"""FlashAttention-3 in fp8: what is quantised how, and how far that is from 16 bits."""

from dataclasses import replace

import pytest
import torch

from krea2_srt.errors import ConfigError
from krea2_srt.kernels.quantize_heads import E4M3, quantize_qkv
from krea2_srt.model.attention import sdpa_attention
from krea2_srt.runner import attention, attention_backends
from krea2_srt.runner.attention import AttentionChoice
from krea2_srt.runner.attention_backends import SDPA, flash_attention_3
from krea2_srt.runner.attention_trial import exact_attention, packed_inputs, trial_fault
from krea2_srt.runner.fp8_attention import (
    KEYS_AT_ONCE,
    MAX_OFFSET,
    emulated_flash_attention_3,
    fp8_attention,
)
from krea2_srt.runner.prompt_encoder import PromptEncoder
from tests.comparisons import CPU, relative_error
from tests.torch.kernels.test_quantize_heads import bits, by_formula, qkv
from tests.torch.runner.attention_stand_ins import few_heads, flash_attn_3, flash_attn_3_operator
from tests.torch.runner.recorded_graph import record

LENGTHS = (6, 250, 0, 7)


def attend(function, q, k, v, segments):
    return fp8_attention(lambda: function, quantize_qkv)(q, k, v, segments)


def test_what_is_emulated_is_what_the_package_is_given():
    """Bit for bit: the emulation stands in the package's place."""
    given = []

    def noted(*args, **kwargs):
        given.append((args, kwargs))
        return emulated_flash_attention_3(*args, **kwargs)

    inputs, segments = qkv(LENGTHS)
    attend(noted, *inputs, segments)
    ((values, options),) = given
    for x, got, name in zip(inputs, values, "qkv", strict=True):
        expected, scales = by_formula(x, 2, segments)
        assert torch.equal(bits(got), bits(expected))
        assert torch.equal(options[f"{name}_descale"], scales)


def rounded_by_the_formula(q, k, v, segments):
    """One query of one head at a time, in float64 where nothing is rounded to e4m3."""
    (q8, qs), (k8, ks), (v8, vs) = (by_formula(x, 2, segments) for x in (q, k, v))
    out = torch.zeros(q.shape, dtype=torch.float64)
    for i, (start, end) in enumerate(segments.spans):
        for head in range(q.shape[1]):
            kv = head // 2
            scale = (qs[i, kv].double() * ks[i, kv].double() / 16**0.5).item()
            keys, values = k8[start:end, kv].double(), v8[start:end, kv].double()
            for t in range(start, end):
                scores = keys @ q8[t, head].double() * scale
                seen = torch.tensor(-torch.inf)
                total, summed = 0.0, torch.zeros(16, dtype=torch.float64)
                for first in range(
                    (end - start - 1) // KEYS_AT_ONCE * KEYS_AT_ONCE, -1, -KEYS_AT_ONCE
                ):
                    tile = slice(first, first + KEYS_AT_ONCE)
                    newest = torch.maximum(seen, scores[tile].max())
                    shrink = (seen - newest).exp()
                    p = 2.0**MAX_OFFSET * (scores[tile] - newest).exp()
                    total = total * shrink + p.sum()
                    summed = summed * shrink + p.float().to(E4M3).double() @ values[tile]
                    seen = newest
                out[t, head] = summed / total * vs[i, kv].double()
    return out


def test_the_emulation_rounds_where_the_kernel_does():
    """Tile by tile from the last key; differences are bf16's of the result, and those of P where
    float32 and float64 lie on two sides of a middle.
    """
    inputs, segments = qkv(LENGTHS)
    got = attend(emulated_flash_attention_3, *inputs, segments)
    assert relative_error(got, rounded_by_the_formula(*inputs, segments)) <= 3e-3
    assert relative_error(got, exact_attention(*inputs, segments)) >= 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_a_few_percent_from_16_bits(dtype):
    *inputs, segments = packed_inputs(LENGTHS, CPU, dtype)
    out = attend(flash_attn_3, *inputs, segments)
    assert out.dtype == dtype
    assert relative_error(out, exact_attention(*inputs, segments)) <= 0.06


@pytest.fixture
def in_torch(monkeypatch):
    """Quantised by the reference, and trials on few heads."""
    monkeypatch.setattr(attention_backends, "quantize_qkv_triton", quantize_qkv)
    few_heads(monkeypatch)


def test_it_passes_its_trial_replay_included_and_its_tolerance_is_no_carte_blanche(in_torch):
    backend = flash_attention_3(lambda: flash_attn_3_operator)[1]
    assert backend.capturable
    assert trial_fault(backend, CPU, torch.bfloat16, record) == ""

    def without_scales(*args, **options):
        ones = {name: torch.ones_like(x) for name, x in options.items() if "descale" in name}
        return flash_attn_3(*args, **options | ones)

    wrong = flash_attention_3(lambda: without_scales)[1]
    assert trial_fault(wrong, CPU, torch.bfloat16).startswith("differs from float64")


def test_it_is_taken_only_by_name(in_torch, monkeypatch):
    monkeypatch.setattr(attention, "_can_flash", lambda device, dtype: True)
    monkeypatch.setattr(attention, "_major", lambda device: 9)
    monkeypatch.setattr(attention, "LARGE_PACK", (64,))
    candidates = {b.name: b for b in flash_attention_3(lambda: flash_attn_3)}

    def choose(forced):
        arguments = (CPU, torch.bfloat16, forced, candidates, lambda function: 1.0)
        return attention.choose_attention(*arguments)

    assert choose("auto").name == "fa3"
    forced = choose("fa3_fp8")
    assert forced.name == "fa3_fp8"
    assert forced.graph is forced.eager


def test_without_the_package_it_is_refused_by_name():
    message = r"^attention: fa3_fp8 is not installed; it needs FlashAttention-3: the package flash"
    with pytest.raises(ConfigError, match=message):
        attention.choose_attention(CPU, torch.bfloat16, "fa3_fp8", {})


def test_prompts_are_fused_in_16_bits(runner):
    def in_8_bits(q, k, v, segments):
        raise AssertionError("text fusion attends in 16 bits")

    fa3, fa3_fp8 = flash_attention_3(lambda: flash_attn_3)
    assert fa3.prompts is None
    assert fa3_fp8.prompts is fa3.attend
    backend = replace(SDPA, attend=in_8_bits, prompts=sdpa_attention)
    encoder = PromptEncoder(runner.text_encoder, runner.dit, AttentionChoice(backend, None))
    (context,) = encoder.encode(["a cat"])
    assert torch.equal(context, runner.encode(["a cat"])[0])
