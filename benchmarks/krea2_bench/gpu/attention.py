"""Attention back ends: right, fast, and captured in a graph?"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from krea2_bench.gpu.context import Context
from krea2_bench.gpu.correctness import check
from krea2_bench.gpu.rows import LEFT_OUT, Missing, rate
from krea2_bench.gpu.sequences import relative
from krea2_bench.gpu.stand_ins import OFFSETS
from krea2_bench.gpu.timing import queued
from krea2_srt.model.pack import Segments
from krea2_srt.runner.attention_backends import AttentionBackend, known_backends
from krea2_srt.runner.attention_trial import trial_fault

PACKS = {
    "1024x1024": [4160],
    "2048x2048": [16448],
    "4 of 512x512": [1088] * 4,
    "8 of 256x256": [320] * 8,
}
CHECKED = ("1024x1024", "4 of 512x512", "2048x2048")
"""Packs whose errors are looked at."""

TOLERANCE = 1e-2
"""Relative error of a pack in bf16; that of the rounding of its result alone is 2e-3."""

_CHUNK = 2048
"""Queries whose scores are held in float32 at a time."""


def run(context: Context) -> None:
    """Every back end that runs here, on views of a fused projection as the model has them."""
    backends = []
    for backend in _backends(context):
        if reason := _out(context, backend):
            context.findings.miss(Missing("attention", backend.name, LEFT_OUT, reason))
        else:
            backends.append(backend)
    for backend in backends:
        if backend.capturable:
            with context.findings.attempt("attention", f"{backend.name} captured"):
                _captured(context, backend)
    for name, lengths in PACKS.items():
        if context.smoke:
            lengths = [max(1, length // 100) for length in lengths]
        q, k, v, segments = inputs(context, lengths)
        expected = exact(q, k, v, segments) if name in CHECKED else None
        for backend in backends:
            with context.findings.attempt("attention", f"{backend.name} {name}"):
                if expected is not None:
                    error = relative(backend.attend(q, k, v, segments), expected)
                    what = f"{backend.name} {name} vs float32"
                    check(context, "attention", what, error, _tolerance(context, backend))
                _time(context, backend, name, partial(backend.attend, q, k, v, segments), lengths)


def _backends(context: Context) -> list[AttentionBackend]:
    found = list(known_backends().values())
    return found if context.on_gpu else [*found, OFFSETS]


def _out(context: Context, backend: AttentionBackend) -> str:
    """Why a back end does not run here; empty where it does."""
    if not context.on_gpu:
        cpu = ("sdpa", OFFSETS.name)
        return "" if backend.name in cpu else "needs a GPU"
    major = torch.cuda.get_device_capability(context.device)[0]
    if backend.majors and major not in backend.majors:
        made = ", ".join(f"{m}.x" for m in backend.majors)
        return f"is made for compute capability {made}, this GPU has {major}.x"
    # Also those that a server takes only by name, of which the list is empty.
    return trial_fault(backend, context.device, context.dtype)


def _tolerance(context: Context, backend: AttentionBackend) -> float:
    """The tolerance; that of 8 bits is larger: what it costs is a matter of taste, not of
    correctness.
    """
    return 0.1 if "fp8" in backend.name else TOLERANCE


def _time(
    context: Context,
    backend: AttentionBackend,
    name: str,
    work: Callable[[], Tensor],
    lengths: list[int],
) -> None:
    config = context.config
    width = config.num_attention_heads * config.attention_head_dim
    flops = 4 * width * sum(length * length for length in lengths)
    seconds = 0.01 if context.smoke else 0.3
    timing = queued(work, context.device, 2 if context.smoke else 5, seconds)
    ceiling = context.findings.get("ceilings", "matmul bf16")
    what = f"{backend.name} {name}"
    context.findings.add(rate("attention", what, flops / 1e9, timing, "TFLOP/s", ceiling))


def inputs(context: Context, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor, Segments]:
    """Queries, keys and values of a pack, views of a fused projection."""
    config = context.config
    head_dim = config.attention_head_dim
    width, kv_width = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    sizes = [width, kv_width, kv_width, width]
    generator = torch.Generator(context.device).manual_seed(5)
    fused = torch.randn(
        sum(lengths), sum(sizes), generator=generator, device=context.device, dtype=context.dtype
    )
    q, k, v, _ = (x.unflatten(-1, (-1, head_dim)) for x in fused.split(sizes, dim=-1))
    return q, k, v, Segments.of(lengths, context.device)


def exact(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """In float32, by the formula; some queries at a time, since scores would fill the GPU."""
    out = torch.empty(q.shape, device=q.device)
    groups = q.shape[1] // k.shape[1]
    for start, end in segments.spans:
        for head in range(k.shape[1]):
            heads = slice(head * groups, (head + 1) * groups)
            keys, values = k[start:end, head].float(), v[start:end, head].float()
            for first in range(start, end, _CHUNK):
                rows = slice(first, min(first + _CHUNK, end))
                scores = q[rows, heads].float() @ keys.t() * q.shape[-1] ** -0.5
                out[rows, heads] = scores.softmax(-1) @ values
    return out


def _captured(context: Context, backend: AttentionBackend) -> None:
    """A graph that was captured with some lengths, replayed with others."""
    first, then = ([30, 2, 9], [7, 33]) if context.smoke else ([1088, 300, 520], [700, 77, 1000])
    total, most = max(sum(first), sum(then)), 4
    q, k, v, _ = inputs(context, [total])
    offsets = torch.zeros(most + 1, dtype=torch.int32, device=context.device)
    segments = Segments(offsets, (), total)
    out = torch.empty_like(q)

    def load(lengths: list[int]) -> Segments:
        """Padded with a segment to the end, and with empty ones."""
        padded = [*lengths, total - sum(lengths)]
        padded += [0] * (most - len(padded))
        found = Segments.of(padded, context.device)
        offsets.copy_(found.cu_seqlens)
        return found

    load(first)
    replay = context.capture(lambda: out.copy_(backend.attend(q, k, v, segments)))
    spans = [span for span in pairwise(load(then).cu_seqlens.tolist()) if span[0] < span[1]]
    replay()
    expected = exact(q, k, v, Segments(offsets, tuple(spans), total))
    error = relative(out, expected)
    what = f"{backend.name} captured, other lengths, vs float32"
    check(context, "attention", what, error, _tolerance(context, backend), how="graph")
