"""What a failing device raises, in our errors."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from krea2_srt.errors import DeviceLostError, OutOfMemoryError, first_line

# Of the host's allocator, cuBLAS, cuDNN and the driver, which have no exception of their own.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "alloc_failed")


@contextmanager
def device_errors() -> Iterator[None]:
    """Raise our errors where memory runs out, or where the GPU is lost.

    Raises:
        OutOfMemoryError: memory ran out; what the failed work held has been given back. The frame
            that this is entered in still runs, so it should hold none of it.
        DeviceLostError: the GPU answers nothing any more. An error of a kernel is found by
            whatever is called next, so it says nothing about that.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(error) from error
    except RuntimeError as error:
        if any(marker in str(error).lower() for marker in _OUT_OF_MEMORY):
            raise _out_of_memory(error) from error
        _check_device(error)
        raise


def _out_of_memory(error: BaseException) -> OutOfMemoryError:
    # Frames in which something failed hold its tensors for as long as there is a traceback.
    failed: BaseException | None = error
    while failed is not None:
        traceback.clear_frames(failed.__traceback__)
        failed = failed.__cause__ or failed.__context__
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return OutOfMemoryError(f"out of memory: {first_line(error)}")


def _check_device(error: RuntimeError) -> None:
    """Raise `DeviceLostError` if the GPU answers nothing any more: no request would succeed."""
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        raise DeviceLostError(first_line(error)) from error
