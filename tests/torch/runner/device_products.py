"""Adapters' products in torch that read slots and scales on the device alone, as the kernels do.

The references of `krea2_srt.kernels.lora` read them on the host, so that a recorded graph of them
would serve the adapters that it was recorded with.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def device_shrink(x: Tensor, down: Tensor, index: Tensor, slots: Tensor, parts: int) -> Tensor:
    """See `krea2_srt.kernels.lora.lora_shrink`."""
    of_token = slots[index.long()]
    by_slot = torch.einsum("tw,scw->tsc", x, down)
    places = of_token.clamp(min=0).long()[..., None].expand(-1, -1, down.shape[1])
    return torch.where(of_token[..., None] >= 0, by_slot.gather(1, places), 0.0)


def device_expand(
    out: Tensor,
    h: Tensor,
    up: Tensor,
    index: Tensor,
    slots: Tensor,
    scales: Tensor,
    part_starts: Sequence[int],
) -> None:
    """See `krea2_srt.kernels.lora.lora_expand`."""
    of_token, rank = slots[index.long()], up.shape[2]
    scaled = torch.where(of_token >= 0, scales[index.long()], 0.0)[..., None] * h
    places = of_token.clamp(min=0).long()[..., None].expand(-1, -1, h.shape[2])
    by_slot = h.new_zeros(len(h), len(up), h.shape[2]).scatter_add_(1, places, scaled)
    for part, (first, last) in enumerate(pairwise((*part_starts, up.shape[1]))):
        mine = by_slot[:, :, part * rank : (part + 1) * rank]
        out[:, first:last] += torch.einsum("tsr,scr->tc", mine, up[:, first:last])
