"""How torch's allocator takes memory from a GPU."""

import logging
import os

import torch

from krea2_srt.errors import first_line

logger = logging.getLogger(__name__)

SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Environment variables of torch; whoever sets one has decided."""

_TRIED_BYTES = 64 * 2**20


def use_expandable_segments(device: torch.device) -> None:
    """Let blocks of memory grow, before anything large is allocated.

    Packs of ever other sizes, and graphs that are captured from small to large, would leave free
    pieces that nothing fits into: gigabytes on a GPU that is nearly full. Where a GPU cannot, as
    some virtual ones, all stays as it was.
    """
    if device.type != "cuda" or any(name in os.environ for name in SETTINGS):
        return
    _set(True)
    try:
        torch.empty(_TRIED_BYTES, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        _set(False)
        logger.info("krea2-srt: no expandable segments: %s", first_line(error))


def _set(on: bool) -> None:
    setting = f"expandable_segments:{on}"
    if hasattr(torch._C, "_accelerator_setAllocatorSettings"):
        torch._C._accelerator_setAllocatorSettings(setting)
    else:  # before torch 2.9
        torch.cuda.memory._set_allocator_settings(setting)
