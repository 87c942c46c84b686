"""Host memory that a device copies from at the full rate, and no more of it than is asked for."""

import mmap
import weakref

import torch
from torch import Tensor

from krea2_srt.errors import ConfigError


def pinned_bytes(count: int) -> Tensor:
    """Pinned host memory of exactly so many bytes: uint8 [count], zeros.

    torch's own allocator of pinned memory makes powers of two of all sizes: 512 MiB of the 414 of
    a block in 8 bits, 10.3 GiB of a text encoder's 7.3. Here whole pages are taken from the system
    and locked where they are.

    Whoever has queued copies from it must have waited for them before it goes.

    Args:
        count: bytes, above 0.

    Raises:
        ConfigError: the system does not lock as much.
    """
    memory = torch.frombuffer(mmap.mmap(-1, count), dtype=torch.uint8)
    address = memory.data_ptr()
    runtime = torch.cuda.cudart()
    if status := int(runtime.cudaHostRegister(address, count, 0)):
        raise ConfigError(
            f"host memory: {count / 2**30:.2f} GiB more could not be pinned (CUDA error {status}); "
            f"text_encoder resident, or fewer streamed_blocks, need less"
        )
    # The storage goes with its last view, and the pages after it.
    unlock = weakref.finalize(memory.untyped_storage(), runtime.cudaHostUnregister, address)
    unlock.atexit = False  # the system does it, and CUDA may be gone
    return memory


def pinned_copy(tensor: Tensor) -> Tensor:
    """A copy of a host tensor in such memory.

    Raises:
        ConfigError: see `pinned_bytes`.
    """
    copy = pinned_bytes(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)
