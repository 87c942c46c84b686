"""Copies of small host tensors to the device that nobody waits for.

A copy from ordinary memory makes the host wait until the device has done all that was queued
before. One from pinned memory is queued like a kernel.
"""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device; on a CPU the tensor itself.

    Args:
        tensor: on the host. It may be changed or dropped at once: the device reads a copy of it in
            pinned memory, which torch's allocator keeps until then.
        device: where it is needed.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def copy_to(place: Tensor, tensor: Tensor) -> None:
    """The same into a tensor that is on the device already.

    Args:
        place: of the tensor's shape.
        tensor: on the host.
    """
    if place.device.type == "cuda":
        place.copy_(tensor.pin_memory(), non_blocking=True)
    else:
        place.copy_(tensor)
