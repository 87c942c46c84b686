"""One Euler step of every sequence of a pack at once, guidance included.

    v = velocity + guidance[row] * (velocity - velocity[uncond_index])
    tokens <- tokens + dt[row] * v

``uncond_index`` of a token is the same token in the forward with the negative prompt.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from krea2_srt.kernels.launch import device_of


def euler_step(
    tokens: Tensor,
    velocity: Tensor,
    row: Tensor,
    uncond_index: Tensor,
    dt: Tensor,
    guidance: Tensor,
    guided: Tensor,
    non_finite: Tensor,
) -> None:
    """Step in place.

    Args:
        tokens: float32 [T, channels], the noisy patches; stepped.
        velocity: [T, channels] in the compute dtype.
        row: int32 [T], the row of dt and guidance that each token reads.
        uncond_index: int32 [T]; itself without guidance, -1 for a token that is no patch and stays.
        dt: float32 [rows], sigma after the step minus sigma before it.
        guidance: float32 [rows], 0 without guidance.
        guided: float32 [T, channels]; overwritten with v, for previews.
        non_finite: int32 [rows]; overwritten with 1 where a token that steps is not finite, else 0.
    """
    v = velocity.float()
    v = v + guidance[row][:, None] * (v - v[uncond_index.clamp(min=0)])
    live = (uncond_index >= 0)[:, None]
    guided.copy_(torch.where(live, v, 0))
    tokens.copy_(torch.where(live, tokens + dt[row][:, None] * v, tokens))
    odd = live[:, 0] & ~torch.isfinite(tokens).all(1)
    non_finite.zero_().index_add_(0, row, odd.to(non_finite.dtype)).clamp_(max=1)


# dt and guidance are rows of one small matrix: how they are aligned must not compile another kernel
# while requests wait.
@triton.jit(
    do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["dt_ptr", "guidance_ptr"]
)
def _euler_kernel(
    tokens_ptr,
    velocity_ptr,
    row_ptr,
    uncond_index_ptr,
    dt_ptr,
    guidance_ptr,
    guided_ptr,
    non_finite_ptr,
    num_tokens,
    CHANNELS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    live = token < num_tokens
    row = tl.load(row_ptr + token, live, 0)
    uncond_index = tl.load(uncond_index_ptr + token, live, -1)
    moves = live & (uncond_index >= 0)
    channel = tl.arange(0, CHANNELS)
    at = token[:, None] * CHANNELS + channel[None, :]
    other = uncond_index[:, None] * CHANNELS + channel[None, :]
    v = tl.load(velocity_ptr + at, moves[:, None], 0.0).to(tl.float32)
    negative = tl.load(velocity_ptr + other, moves[:, None], 0.0).to(tl.float32)
    v += tl.load(guidance_ptr + row, live, 0.0)[:, None] * (v - negative)
    x = tl.load(tokens_ptr + at, live[:, None], 0.0)
    x += tl.load(dt_ptr + row, live, 0.0)[:, None] * v
    tl.store(guided_ptr + at, v, live[:, None])
    tl.store(tokens_ptr + at, x, moves[:, None])
    # False of NaN too. All programs that write here write 1.
    odd = 1 - tl.min((tl.abs(x) < float("inf")).to(tl.int32), 1)
    tl.store(non_finite_ptr + row, odd, moves & (odd > 0))


def euler_step_triton(
    tokens: Tensor,
    velocity: Tensor,
    row: Tensor,
    uncond_index: Tensor,
    dt: Tensor,
    guidance: Tensor,
    guided: Tensor,
    non_finite: Tensor,
) -> None:
    """See `euler_step`; channels must be a power of two."""
    num_tokens, channels = tokens.shape
    assert all(t.is_contiguous() for t in (tokens, velocity, guided))
    launch, _ = device_of(tokens.device).launch("euler", num_tokens)
    non_finite.zero_()
    _euler_kernel[(triton.cdiv(num_tokens, launch.tokens),)](
        tokens,
        velocity,
        row,
        uncond_index,
        dt,
        guidance,
        guided,
        non_finite,
        num_tokens,
        CHANNELS=channels,
        TOKENS=launch.tokens,
        num_warps=launch.num_warps,
    )
