"""FlashAttention-3 in fp8: what is quantised how, and how far that is from 16 bits."""

import pytest
import torch

from krea2_srt.errors import ConfigError
from krea2_srt.kernels.quantize import LARGEST, SMALLEST
from krea2_srt.model.pack import Segments
from krea2_srt.runner import attention, fp8_attention
from krea2_srt.runner.attention_backends import flash_attention_3
from krea2_srt.runner.attention_trial import exact_attention, trial_fault
from krea2_srt.runner.fp8_attention import (
    E4M3,
    KEYS_AT_ONCE,
    MAX_OFFSET,
    emulated_flash_attention_3,
    quantize_heads,
)
from tests.conftest import CPU, relative_error
from tests.runner.attention_stand_ins import few_heads, flash_attn_3, flash_attn_3_operator
from tests.runner.recorded_graph import record

LENGTHS = [6, 250, 0, 7]
SEGMENTS = Segments.of(LENGTHS, CPU)


def qkv(heads=4, kv_heads=2, dtype=torch.bfloat16, spread=1.0):
    """Views of one matrix; with a spread, every head and segment has a magnitude of its own."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(263, heads + 2 * kv_heads, 16, generator=generator)
    fused *= torch.logspace(-spread, spread, heads + 2 * kv_heads)[:, None]
    for i, (start, end) in enumerate(SEGMENTS.spans):
        fused[start:end, heads:] *= 1 + spread * i
    return fused.to(dtype).split([heads, kv_heads, kv_heads], dim=1)


def quantized_one_by_one(x, kv_heads):
    """Segment by segment and head by head, each element divided as the formula says."""
    values = torch.empty(x.shape, dtype=E4M3)
    scales = torch.empty(len(LENGTHS), kv_heads)
    group = x.shape[1] // kv_heads
    for i, (start, end) in enumerate(SEGMENTS.spans):
        for head in range(kv_heads):
            block = x[start:end, head * group : (head + 1) * group].float()
            largest = max([abs(element) for element in block.flatten().tolist()], default=0.0)
            scale = torch.tensor(largest).clamp(min=SMALLEST) / LARGEST[E4M3]
            scales[i, head] = scale
            rounded = (block * (1 / scale)).clamp(-448, 448).to(E4M3)
            values[start:end, head * group : (head + 1) * group] = rounded
    return values, scales


def bits(x):
    return x.view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_heads_are_quantised_segment_by_segment(dtype, kv_heads):
    for x in qkv(4, 4, dtype):
        values, scales = quantized_one_by_one(x, kv_heads)
        got = quantize_heads(x, kv_heads, SEGMENTS.cu_seqlens)
        assert torch.equal(bits(got.values), bits(values))
        assert torch.equal(got.scale, scales)
        assert got.values.is_contiguous()


def test_what_is_emulated_is_what_the_package_is_given():
    """Bit for bit: the emulation stands in the package's place."""
    given = []

    def noted(*args, **kwargs):
        given.append((args, kwargs))
        return emulated_flash_attention_3(*args, **kwargs)

    q, k, v = qkv()
    fp8_attention.fp8_attention(lambda: noted)(q, k, v, SEGMENTS)
    ((values, options),) = given
    for x, got, name in zip((q, k, v), values, "qkv", strict=True):
        expected, scales = quantized_one_by_one(x, 2)
        assert torch.equal(bits(got), bits(expected))
        assert torch.equal(options[f"{name}_descale"], scales)


def rounded_by_the_formula(q, k, v):
    """One query of one head at a time, in float64 where nothing is rounded to e4m3."""
    (q8, qs), (k8, ks), (v8, vs) = (quantized_one_by_one(x, 2) for x in (q, k, v))
    out = torch.zeros(q.shape, dtype=torch.float64)
    for i, (start, end) in enumerate(SEGMENTS.spans):
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
    q, k, v = qkv()
    got = fp8_attention.fp8_attention(lambda: emulated_flash_attention_3)(q, k, v, SEGMENTS)
    expected = rounded_by_the_formula(q, k, v)
    assert relative_error(got, expected) <= 3e-3
    assert relative_error(got, exact_attention(q, k, v, SEGMENTS)) >= 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_a_few_percent_from_16_bits(dtype):
    q, k, v = qkv(dtype=dtype, spread=0.0)
    out = fp8_attention.fp8_attention(lambda: flash_attn_3)(q, k, v, SEGMENTS)
    assert out.dtype == dtype
    assert relative_error(out, exact_attention(q, k, v, SEGMENTS)) <= 0.06


def test_a_segment_does_not_depend_on_its_neighbours():
    q, k, v = qkv()
    attend = fp8_attention.fp8_attention(lambda: flash_attn_3)
    together = attend(q, k, v, SEGMENTS)
    for start, end in SEGMENTS.spans:
        if start < end:
            alone = Segments.of([end - start], CPU)
            assert torch.equal(
                attend(q[start:end], k[start:end], v[start:end], alone), together[start:end]
            )


def test_it_passes_its_trial_replay_included_and_its_tolerance_is_no_carte_blanche(monkeypatch):
    few_heads(monkeypatch)
    backend = flash_attention_3(lambda: flash_attn_3_operator)[1]
    assert backend.capturable
    assert trial_fault(backend, CPU, torch.bfloat16, record) == ""

    def without_scales(*args, **options):
        ones = {name: torch.ones_like(x) for name, x in options.items() if "descale" in name}
        return flash_attn_3(*args, **options | ones)

    wrong = flash_attention_3(lambda: without_scales)[1]
    assert trial_fault(wrong, CPU, torch.bfloat16).startswith("differs from float64")


def test_it_is_taken_only_by_name(monkeypatch):
    few_heads(monkeypatch)
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
