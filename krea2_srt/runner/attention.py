"""Attention back ends by name, and the choice among them by measurement.

SGLang's FlashAttention-3/4 kernels are added by `krea2_srt.sglang`, which may import SGLang.
"""

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from krea2_srt.errors import ConfigError, first_line
from krea2_srt.model.attention import VarlenAttention, sdpa_attention
from krea2_srt.model.pack import Segments

logger = logging.getLogger(__name__)

HEADS, KV_HEADS, HEAD_DIM = 48, 12, 128
"""Of the released model, on which candidates are tried and timed."""

HOPPER, BLACKWELL = (9,), (10,)
"""Major compute capabilities."""

LARGE_PACK = (4160,)
"""Segments of the pack on which the eager back end is chosen: one image of 1024 x 1024."""

SMALL_PACK = (300, 290, 310, 280)
"""The same for graphs: four images of 256 x 256."""

CROSSOVER_TOKENS = 2048
"""Attention is 6% of a step here and grows; launching kernels one by one costs less and less."""

_TRIAL = (5, 128, 1, 77)
_TOLERANCE = 2e-2
"""Largest difference to SDPA on unit-variance bf16 inputs that still counts as rounding."""

_REPEATS = 7


@dataclass(frozen=True)
class AttentionBackend:
    """One way to attend.

    Attributes:
        name: to force it by.
        attend: does it.
        capturable: it reads segment offsets on the device alone, never ``segments.spans``, so that
            a CUDA graph of it serves other lengths.
        majors: compute capabilities that it is made for; elsewhere it is tried only when forced,
            since to find out that it does not run there can take half a minute. None is any.
    """

    name: str
    attend: VarlenAttention
    capturable: bool
    majors: tuple[int, ...] | None = None


@dataclass(frozen=True)
class AttentionChoice:
    """What attends.

    Attributes:
        eager: where no graph runs.
        graph: in graphs; None if nothing can be captured.
    """

    eager: AttentionBackend
    graph: AttentionBackend | None

    @property
    def max_graph_tokens(self) -> float:
        """Of a pack from which on the eager back end gains more than a graph would."""
        return float("inf") if self.graph is self.eager else CROSSOVER_TOKENS

    @property
    def name(self) -> str:
        """One name, or both where they differ."""
        names = [self.eager.name] + ([self.graph.name] if self.graph else [])
        return "+".join(dict.fromkeys(names))


def torch_varlen_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """`VarlenAttention` on torch's own FlashAttention, one call for the whole pack. CUDA only."""
    from torch.nn.attention import varlen

    offsets, longest = segments.cu_seqlens, segments.max_seqlen
    if _takes_gqa(varlen.varlen_attn):
        out: Any = varlen.varlen_attn(
            q, k, v, offsets, offsets, longest, longest, enable_gqa=q.shape[1] > k.shape[1]
        )
        return out
    # Before 2.14 the Python function refuses grouped heads, which the operator below it takes.
    return torch.ops.aten._flash_attention_forward(
        q, k, v, offsets, offsets, longest, longest, 0.0, False, False
    )[0]


@cache
def _takes_gqa(function: Callable[..., Any]) -> bool:
    return "enable_gqa" in inspect.signature(function).parameters


def cudnn_attention(grouped: bool) -> VarlenAttention:
    """`VarlenAttention` as one call of cuDNN's kernel per segment. CUDA only.

    Args:
        grouped: leave grouped heads to cuDNN, which older versions do not take; otherwise the
            key/value heads are repeated.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        if groups > 1 and not grouped:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        pieces = []
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            for start, end in segments.spans:
                if start == end:
                    continue
                q_, k_, v_ = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
                out = F.scaled_dot_product_attention(q_, k_, v_, enable_gqa=grouped and groups > 1)
                pieces.append(out.squeeze(0).transpose(0, 1))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    return attend


def flash_attention_3(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """`VarlenAttention` on the FlashAttention-3 package. Hopper only."""
    from flash_attn_interface import flash_attn_varlen_func

    return call_flash_attention(flash_attn_varlen_func, q, k, v, segments)


def flash_attention_4(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """`VarlenAttention` on the FlashAttention-4 package. Blackwell."""
    from flash_attn.cute import flash_attn_varlen_func

    return call_flash_attention(flash_attn_varlen_func, q, k, v, segments)


def call_flash_attention(
    function: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    **options: Any,
) -> Tensor:
    """A ``flash_attn_varlen_func`` on a pack; all packages give it the same arguments."""
    out = function(
        q,
        k,
        v,
        cu_seqlens_q=segments.cu_seqlens,
        cu_seqlens_k=segments.cu_seqlens,
        max_seqlen_q=segments.max_seqlen,
        max_seqlen_k=segments.max_seqlen,
        causal=False,
        **options,
    )
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


SDPA = AttentionBackend("sdpa", sdpa_attention, capturable=False)
"""Runs anywhere."""

SDPA_ONLY = AttentionChoice(SDPA, None)


def known_backends() -> dict[str, AttentionBackend]:
    """Those of this module whose package is installed, by name."""
    found = [
        SDPA,
        AttentionBackend("torch_varlen", torch_varlen_attention, capturable=True),
        AttentionBackend("cudnn", cudnn_attention(grouped=True), capturable=False),
        AttentionBackend("cudnn_repeated", cudnn_attention(grouped=False), capturable=False),
    ]
    if find_spec("flash_attn_interface") is not None:
        found.append(AttentionBackend("fa3", flash_attention_3, True, HOPPER))
    if find_spec("flash_attn") is not None and find_spec("flash_attn.cute") is not None:
        found.append(AttentionBackend("fa4", flash_attention_4, True, BLACKWELL))
    return {backend.name: backend for backend in found}


Timer = Callable[[Callable[[], object]], float]


def choose_attention(
    device: torch.device,
    dtype: torch.dtype,
    forced: str = "auto",
    candidates: Mapping[str, AttentionBackend] | None = None,
    timer: Timer | None = None,
) -> AttentionChoice:
    """Try and time what there is on a device; about a second on a GPU.

    A candidate that does not build, does not run or does not agree with SDPA is passed over.

    Args:
        device, dtype: of the model.
        forced: a candidate's name, to have no other.
        candidates: by name; `known_backends` by default.
        timer: milliseconds of a function's work on the device.

    Raises:
        ConfigError: the forced one is unknown, or fails its trial.
    """
    candidates = known_backends() if candidates is None else candidates
    if forced != "auto" and forced not in candidates:
        known = ", ".join(["auto", *candidates])
        raise ConfigError(f"attention: must be one of {known}, got {forced!r}")
    if not _can_flash(device, dtype):
        if forced not in ("auto", SDPA.name):
            raise ConfigError(f"attention: {forced} does not run on {device} in {dtype}")
        return SDPA_ONLY
    if forced != "auto":
        backend = candidates[forced]
        if reason := _fault(backend, device, dtype):
            raise ConfigError(f"attention: {forced} fails on this device: {reason}")
        return AttentionChoice(backend, backend if backend.capturable else None)
    timer = timer or cuda_milliseconds
    eager: dict[str, float] = {}
    graph: dict[str, float] = {}
    for name, backend in candidates.items():
        if backend.majors is not None and _major(device) not in backend.majors:
            continue
        if reason := _fault(backend, device, dtype):
            logger.info("krea2-srt: attention %s is passed over: %s", name, reason)
            continue
        eager[name] = timer(_pack(backend, LARGE_PACK, device, dtype))
        if backend.capturable:
            graph[name] = timer(_pack(backend, SMALL_PACK, device, dtype))
    if not eager:
        return SDPA_ONLY
    choice = AttentionChoice(
        candidates[min(eager, key=lambda name: _handicapped(candidates[name], eager[name]))],
        candidates[min(graph, key=graph.__getitem__)] if graph else None,
    )
    logger.info(
        "krea2-srt: attention %s; ms at 1024x1024: %s; at 4 of 256x256: %s",
        choice.name,
        ", ".join(f"{name} {ms:.3g}" for name, ms in sorted(eager.items(), key=lambda x: x[1])),
        ", ".join(f"{name} {ms:.3g}" for name, ms in sorted(graph.items(), key=lambda x: x[1])),
    )
    return choice


def _handicapped(backend: AttentionBackend, ms: float) -> float:
    """Those that go by segment build a plan for every new length, while its request waits."""
    return ms if backend.capturable else ms * 1.1


def cuda_milliseconds(function: Callable[[], object]) -> float:
    """Median time of a function's work on the current CUDA device."""
    for _ in range(2):
        function()
    times = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _can_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is more than SDPA: all kernels need 16 bits, and Ampere or newer."""
    return (
        device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) and _major(device) >= 8
    )


def _inputs(
    lengths: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Segments]:
    """Views of a fused projection, as the model has them; the last segment is empty."""
    generator = torch.Generator(device).manual_seed(0)
    width = (HEADS + 2 * KV_HEADS + HEADS) * HEAD_DIM
    fused = torch.randn(sum(lengths), width, generator=generator, device=device, dtype=dtype)
    sizes = [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, HEADS * HEAD_DIM]
    q, k, v, _ = (x.unflatten(-1, (-1, HEAD_DIM)) for x in fused.split(sizes, dim=-1))
    return q, k, v, Segments.of((*lengths, 0), device)


def _pack(
    backend: AttentionBackend, lengths: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Callable[[], Tensor]:
    q, k, v, segments = _inputs(lengths, device, dtype)
    return torch.inference_mode()(lambda: backend.attend(q, k, v, segments))


@torch.inference_mode()
def _fault(backend: AttentionBackend, device: torch.device, dtype: torch.dtype) -> str:
    """Why it cannot be used; empty where it can."""
    q, k, v, segments = _inputs(_TRIAL, device, dtype)
    expected = sdpa_attention(q, k, v, segments)
    try:
        difference = (backend.attend(q, k, v, segments) - expected).abs().max().item()
    except Exception as error:
        # Kernels fail in many ways (import, JIT, launch); none may keep the server down.
        return first_line(error)
    return "" if difference <= _TOLERANCE else f"differs from SDPA by {difference:.3g}"
