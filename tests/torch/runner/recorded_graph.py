"""A graph without a GPU: records the operations that a function runs, and repeats them.

Like a CUDA graph, and unlike calling the function again, it knows tensors only by their memory:
whatever Python computed while it was recorded stays as it was.
"""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        self.calls: list = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


def record(function: Callable[[], None]) -> Callable[[], None]:
    """See `krea2_srt.runner.graphs.Capture`."""
    with _Recorder() as recorder, torch.no_grad():
        function()

    def replay() -> None:
        with torch.no_grad():
            for func, args, kwargs, result in recorder.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_flatten(result)[0], tree_flatten(again)[0], strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    return replay


def poison(value):
    """All tensors of a tree filled with NaNs, where they are of floating point."""

    def fill(x):
        return x.fill_(float("nan")) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return tree_map(fill, value)
