"""Attention back ends, by their arithmetic per second."""

from functools import partial

import torch

from benchmarks.on_gpu.context import Context
from benchmarks.on_gpu.rows import Row
from benchmarks.on_gpu.timing import queued
from krea2_srt.model.pack import Segments
from krea2_srt.runner.attention import known_backends

PACKS = {
    "1024x1024": [4160],
    "2048x2048": [16448],
    "4 of 512x512": [1088] * 4,
    "8 of 256x256": [320] * 8,
}


def run(context: Context) -> None:
    """Every back end that runs here, on views of a fused projection as the model has them."""
    config, ceiling = context.config, context.findings.get("ceilings", "matmul bf16")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = config.attention_head_dim
    sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim, heads * head_dim]
    generator = torch.Generator(context.device).manual_seed(5)
    for name, lengths in PACKS.items():
        if context.smoke:
            lengths = [max(1, length // 100) for length in lengths]
        fused = torch.randn(
            sum(lengths),
            sum(sizes),
            generator=generator,
            device=context.device,
            dtype=context.dtype,
        )
        q, k, v, _ = (x.unflatten(-1, (-1, head_dim)) for x in fused.split(sizes, dim=-1))
        segments = Segments.of(lengths, context.device)
        flops = 4 * heads * head_dim * sum(length * length for length in lengths)
        for backend in known_backends().values():
            try:
                timing = queued(
                    partial(backend.attend, q, k, v, segments),
                    context.device,
                    2 if context.smoke else 5,
                )
            except Exception:  # not for this device; the choice at the start says why
                continue
            context.findings.rows.append(
                Row(
                    "attention",
                    f"{backend.name} {name}",
                    flops / timing.median / 1e9,
                    "TFLOP/s",
                    flops / timing.high / 1e9,
                    flops / timing.low / 1e9,
                    ceiling,
                    better="more",
                    note=f"{timing.median:.3g} ms",
                )
            )
