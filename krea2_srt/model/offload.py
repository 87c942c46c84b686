"""A module whose weights are in host memory between uses, on the device piece by piece."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from krea2_srt.model.pinned_memory import pinned_copy


def offload(units: Iterable[nn.Module], device: torch.device) -> None:
    """Keep the weights of some modules on the host, and bring those of each to the device only
    while it runs.

    Args:
        units: modules whose weights are on the host; none part of another.
        device: where they run.
    """
    for unit in units:
        _Unit(unit, device)


class _Unit:
    """Swaps the weights of one module around its forward."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._device = device
        self._parameters = list(module.parameters())
        if device.type == "cuda":
            for parameter in self._parameters:
                # Pinned memory is copied at the full rate, and without waiting.
                parameter.data = pinned_copy(parameter.data)
        self._host = [parameter.data for parameter in self._parameters]
        module.register_forward_pre_hook(self._bring)
        module.register_forward_hook(self._leave, always_call=True)

    def _bring(self, module: nn.Module, arguments: Any) -> None:
        for parameter, host in zip(self._parameters, self._host, strict=True):
            parameter.data = host.to(self._device, non_blocking=True, copy=True)

    def _leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        # The copies' memory is used again in the order of the stream, so only once they are read.
        for parameter, host in zip(self._parameters, self._host, strict=True):
            parameter.data = host
