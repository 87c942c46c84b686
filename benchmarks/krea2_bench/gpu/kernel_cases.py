"""Every kernel at the model's sizes: what it should give, and how many bytes it has to move."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from krea2_bench.gpu.context import Context
from krea2_srt.kernels.channel_norm import channel_norm, channel_norm_triton
from krea2_srt.kernels.quantize import (
    QuantizedTokens,
    TokenFormat,
    Tokens,
    quantize_tokens_triton,
    rotate,
    rotation_block,
)
from krea2_srt.kernels.segment_index import SegmentIndex

EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """One call of one kernel.

    Attributes:
        kernel: its name among the launches.
        what: it does here.
        call: runs it; some change their inputs.
        exact: the result in float64, of the inputs as they are before the first call.
        nbytes: read and written at least.
        rotation: of the result.
    """

    kernel: str
    what: str
    call: Callable[[], Tokens]
    exact: Callable[[], Tensor]
    nbytes: int
    rotation: int = 0


def cases(context: Context, tokens: int, least_bytes: int = 0) -> Iterator[Case]:
    """All kernels on a pack of so many tokens, of four sequences.

    Args:
        context: of the device.
        tokens: of the pack.
        least_bytes: read and written by each; where a pack has too few, the kernel gets more.
    """
    config, device, dtype = context.config, context.device, context.dtype
    do = context.operations
    hidden, mlp = config.hidden_size, config.intermediate_size
    heads, kv_heads, head_dim = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.attention_head_dim,
    )
    generator = torch.Generator(device).manual_seed(3)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    index = torch.arange(tokens, device=device, dtype=torch.int32) * 4 // tokens
    rows = SegmentIndex(index, None)
    x, branch = random(tokens, hidden), random(tokens, hidden)
    scale = 1 + 0.1 * random(4, hidden, dtype=torch.float32)
    shift, gate = random(4, hidden, dtype=torch.float32), 0.1 * random(4, hidden)
    element = x.element_size()
    stream = tokens * hidden * element

    def norm(stream: Tensor) -> Tensor:
        stream = stream.double()
        normed = stream / (stream.square().mean(-1, keepdim=True) + EPS).sqrt()
        return normed * scale.double()[index] + shift.double()[index]

    def gated() -> Tensor:
        found = x.double() + gate.double()[index] * branch.double()
        return norm(found.to(dtype))

    formats: list[tuple[str, TokenFormat | None]] = [("", None)]
    if device.type == "cuda":
        formats += [
            (" fp8", TokenFormat()),
            (" int8 rotated", TokenFormat(torch.int8, rotation_block(hidden))),
        ]
    for name, format in formats:
        out = stream if format is None else tokens * hidden
        suffix = "_8bit" if format else ""
        block = format.rotation if format else 0
        yield Case(
            f"norm{suffix}",
            f"norm{name}",
            lambda f=format: do.norm_scale_shift(x, scale, shift, rows, EPS, f),
            lambda: norm(x),
            stream + out,
            block,
        )
        yield Case(
            f"norm{suffix}",
            f"gated norm{name}",
            lambda f=format: do.add_gated_norm(x, gate, branch, scale, shift, rows, EPS, f),
            gated,
            3 * stream + out,
            block,
        )
        yield Case(
            f"sigmoid_gate{suffix}",
            f"sigmoid gate{name}",
            lambda f=format: do.sigmoid_gate(x, branch, f),
            lambda: x.double() * torch.sigmoid(branch.double()),
            2 * stream + out,
            block,
        )
    fused = random(tokens, 2 * mlp)
    for name, format in formats:
        out = tokens * mlp * (1 if format else element)
        gate_half, up = fused.chunk(2, dim=1)
        yield Case(
            "silu_mul_8bit" if format else "silu_mul",
            f"silu mul{name}",
            lambda f=format: do.silu_mul(fused, f),
            lambda g=gate_half, u=up: F.silu(g.double()) * u.double(),
            fused.nbytes + out,
            format.rotation if format else 0,
        )
        if format is not None:
            hidden_columns = fused[:, :mlp].contiguous()
            yield Case(
                "quantize_8bit",
                f"quantize{name}",
                lambda h=hidden_columns, f=format: quantize_tokens_triton(h, f),
                lambda h=hidden_columns: h.double(),
                hidden_columns.nbytes + out,
                format.rotation,
            )
    width = (2 * heads + 2 * kv_heads) * head_dim
    projection, touched = random(tokens, width), (heads + kv_heads) * head_dim
    q_scale, k_scale = (1 + 0.1 * random(head_dim, dtype=torch.float32) for _ in range(2))
    angle = random(tokens, head_dim // 2, dtype=torch.float32)
    rope = torch.polar(torch.ones_like(angle), angle)
    before = projection[:, :touched].clone()

    def normed_and_turned() -> Tensor:
        heads_of = before.double().unflatten(1, (-1, head_dim))
        scales = torch.stack([q_scale] * heads + [k_scale] * kv_heads).double()
        y = heads_of / (heads_of.square().mean(-1, keepdim=True) + EPS).sqrt() * scales
        pairs = torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous())
        turned = pairs * rope.to(torch.complex128)[:, None]
        return torch.view_as_real(turned).flatten(-2).flatten(1)

    def qk() -> Tensor:
        do.qk_norm_rope(projection, q_scale, k_scale, rope, heads, kv_heads, EPS)
        return projection[:, :touched]

    yield Case(
        "qk_norm_rope",
        "qk norm rope",
        qk,
        normed_and_turned,
        2 * tokens * touched * element + rope.nbytes,
    )
    channels = config.in_channels
    weight, bias = random(channels, hidden) * hidden**-0.5, random(channels)
    yield Case(
        "final_layer",
        "final layer",
        lambda: do.final_layer(x, scale, shift, rows, EPS, weight, bias),
        lambda: norm(x) @ weight.double().T + bias.double(),
        stream + tokens * channels * element + weight.nbytes,
    )
    # Patches are few bytes a token: more of them, where they are to come from memory.
    count = tokens * math.ceil(least_bytes / (tokens * channels * (3 * 4 + element)) or 1)
    patches, velocity = random(count, channels, dtype=torch.float32), random(count, channels)
    owner = torch.arange(count, device=device, dtype=torch.int32) * 4 // count
    dt, guidance = -0.1 * torch.ones(4, device=device), torch.zeros(4, device=device)
    uncond_index = torch.arange(count, device=device, dtype=torch.int32)
    guided, non_finite = torch.empty_like(patches), torch.zeros(4, device=device, dtype=torch.int32)
    start = patches.double()

    def euler() -> Tensor:
        do.euler_step(patches, velocity, owner, uncond_index, dt, guidance, guided, non_finite)
        return patches

    yield Case(
        "euler",
        "euler",
        euler,
        lambda: start - 0.1 * velocity.double(),
        3 * patches.nbytes + velocity.nbytes,
    )
    side, channels = (8, 16) if context.smoke else (1024, 96)
    image = random(1, channels, side, side).contiguous(memory_format=torch.channels_last)
    gamma = 1 + 0.1 * random(channels, 1, 1)
    on_kernel = channel_norm_triton if device.type == "cuda" else channel_norm
    yield Case(
        "channel_norm",
        "VAE norm silu",
        lambda: on_kernel(image, gamma, True),
        lambda: F.silu(F.normalize(image.double(), dim=1) * gamma.double() * channels**0.5),
        2 * image.nbytes,
    )


def error_of(context: Context, case: Case) -> tuple[float, float]:
    """How far a kernel is from float64, relative to the largest element, and how far it may be."""
    expected = case.exact()  # first: some calls change their inputs
    got = case.call()
    tolerance = 1e-2 if context.dtype is torch.bfloat16 else 1e-5
    if isinstance(got, QuantizedTokens):
        if case.rotation:
            expected = rotate(expected.float(), case.rotation).double()
        # Half a unit: of 3 bits of fraction, or of 127; and what came before.
        half = 0.5 / 127 if got.values.dtype is torch.int8 else 2**-4
        got, tolerance = got.dequantized(), half + 1e-2
    error = (got.double() - expected).abs().max() / expected.abs().max()
    return error.item(), tolerance
