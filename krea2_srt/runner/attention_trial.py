"""Whether an attention back end can be trusted on a device: its errors against float64, eager and
in a CUDA graph that is replayed on another pack.
"""

from functools import cache

import torch
from torch import Tensor

from krea2_srt.errors import first_line
from krea2_srt.model.attention import FusedGateAttention
from krea2_srt.model.pack import Segments
from krea2_srt.runner.attention_backends import AttentionBackend
from krea2_srt.runner.graphs import Capture, CudaCapture

HEADS, KV_HEADS, HEAD_DIM = 48, 12, 128
"""Shape of the released model's attention, on which back ends are tried and timed."""

PROJECTION = HEADS + 2 * KV_HEADS + HEADS
"""Heads of its fused projection: of queries, keys, values and the gate."""

LENGTHS = (6, 128, 333, 77)
"""Lengths of a trial's segments, as packs can have them: none is shorter than a prompt's frame of 5
tokens and one image token. An empty one follows.
"""

OTHER_LENGTHS = (211, 333, 0, 0)
"""As many tokens and segments, for the replay: a graph's last segments are often empty."""


def packed_inputs(
    lengths: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Segments]:
    """Unit-variance queries, keys and values; the last segment is empty."""
    fused, segments = packed_projection(lengths, device, dtype)
    return *projection_views(fused), segments


def packed_projection(
    lengths: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Segments]:
    """The unit-variance fused projection of a pack; the last segment is empty."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (sum(lengths), PROJECTION * HEAD_DIM)
    fused = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    return fused, Segments.of((*lengths, 0), device)


def projection_views(fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a fused projection, as the model has them; the gate follows."""
    q, k, v, _ = fused.unflatten(-1, (-1, HEAD_DIM)).split(
        [HEADS, KV_HEADS, KV_HEADS, HEADS], dim=1
    )
    return q, k, v


def gate_view(fused: Tensor) -> Tensor:
    """The gate of a fused projection, [T, heads * head_dim]."""
    return fused[:, -HEADS * HEAD_DIM :]


def exact_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """`VarlenAttention` by its formula in float64, which no setting of float32 products touches."""
    groups = q.shape[1] // k.shape[1]
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for start, end in segments.spans:
        q_, k_, v_ = (x[start:end].double().transpose(0, 1) for x in (q, k, v))
        k_, v_ = (x.repeat_interleave(groups, dim=0) for x in (k_, v_))
        weights = (q_ @ k_.mT * q.shape[-1] ** -0.5).softmax(-1)
        out[start:end] = (weights @ v_).transpose(0, 1)
    return out


@cache
def trial_capture(device: torch.device) -> Capture:
    """How graphs of trials are captured. Kept: what a failed capture leaves must not be freed."""
    return CudaCapture(device)


@torch.inference_mode()
def trial_fault(
    backend: AttentionBackend,
    device: torch.device,
    dtype: torch.dtype,
    capture: Capture | None = None,
) -> str:
    """Why a back end cannot be used; empty where it can.

    Args:
        device, dtype: of the model.
        capture: how its graphs are captured, if it is capturable; CUDA's by default on a GPU.
    """
    try:
        fused, segments = packed_projection(LENGTHS, device, dtype)
        q, k, v = projection_views(fused)
        expected = exact_attention(q, k, v, segments)
        if fault := _difference(backend.attend(q, k, v, segments), expected, backend.tolerance):
            return fault
        if isinstance(backend.attend, FusedGateAttention):
            out, expected = _attend(backend, fused, segments), _gated(expected, fused)
            if fault := _difference(out, expected, backend.tolerance):
                return f"gated, it {fault}"
        if not backend.capturable:
            return ""
        if capture is None and device.type == "cuda":
            capture = trial_capture(device)
        return replay_fault(backend, device, dtype, capture) if capture is not None else ""
    except Exception as error:
        # Kernels fail in many ways (import, JIT, launch); none may keep the server down.
        return first_line(error)


@torch.inference_mode()
def replay_fault(
    backend: AttentionBackend, device: torch.device, dtype: torch.dtype, capture: Capture
) -> str:
    """Why a graph of a back end does not serve other packs than the one it was captured on; empty
    where it does. What a capture or a replay raises is raised.
    """
    fused, segments = packed_projection(LENGTHS, device, dtype)
    other = Segments.of((*OTHER_LENGTHS, 0), device)
    # As in the graphs of steps: no offsets on the host, and a bound for the longest segment.
    bound = Segments(segments.cu_seqlens, (), max(segments.max_seqlen, other.max_seqlen))
    q, k, v = projection_views(fused)
    out = torch.empty(q.shape, dtype=dtype, device=device)
    replay = capture(lambda: out.copy_(_attend(backend, fused, bound)))
    segments.cu_seqlens.copy_(other.cu_seqlens)
    fused.copy_(fused.flip(0))
    out.fill_(torch.nan)
    replay()
    expected = exact_attention(q, k, v, other)
    if isinstance(backend.attend, FusedGateAttention):
        expected = _gated(expected, fused)
    fault = _difference(out, expected, backend.tolerance)
    return f"replayed in a graph on other lengths, it {fault}" if fault else ""


def _attend(backend: AttentionBackend, fused: Tensor, segments: Segments) -> Tensor:
    """What a back end does of a block: attend, and gate where it can."""
    q, k, v = projection_views(fused)
    if isinstance(backend.attend, FusedGateAttention):
        return backend.attend.attend_gated(q, k, v, gate_view(fused), segments)
    return backend.attend(q, k, v, segments)


def _gated(attended: Tensor, fused: Tensor) -> Tensor:
    return attended * torch.sigmoid(gate_view(fused).double()).view_as(attended)


def _difference(got: Tensor, expected: Tensor, tolerance: float) -> str:
    if got.shape != expected.shape:
        return f"returns the shape {list(got.shape)}, not {list(expected.shape)}"
    error = (got.double() - expected).abs().max().item()
    return "" if error <= tolerance else f"differs from float64 by {error:.3g}"
