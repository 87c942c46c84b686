"""How many bytes of tensors are alive at the fullest moment of something that runs on no device.

Tensors are fake ones on device ``cuda``: they have shapes, dtypes and lives, and no memory, so
the released model runs at its released sizes. Triton's kernels do nothing; what their launchers
allocate counts.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest.mock import patch
from weakref import finalize

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from krea2_srt.kernels import launch, quantize

Module = TypeVar("Module", bound=torch.nn.Module)

CUDA = torch.device("cuda", 0)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make on a GPU, while they live.

    Attributes:
        now, peak: bytes; a storage counts once, whatever views it has.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        old = {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if id(storage) not in old and id(storage) not in self._known:
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        self._known.add(id(storage))
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        finalize(storage, self._forget, id(storage), storage.nbytes())

    def _forget(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.now -= nbytes


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [
        leaf.untyped_storage()
        for leaf in tree_leaves(tree)
        if isinstance(leaf, torch.Tensor) and leaf.is_cuda
    ]


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, padding: int = 0) -> Tensor:
    """As cuDNN gives it, with channels innermost as the weight has them; fake ones forget that."""
    assert weight.is_contiguous(memory_format=torch.channels_last)
    grown = 2 * padding + 1 - weight.shape[-1]
    size = (len(x), len(weight), x.shape[2] + grown, x.shape[3] + grown)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Tensors on ``cuda`` are fake ones, and kernels of Triton do nothing."""
    properties = SimpleNamespace(name="fake", multi_processor_count=132, major=9, minor=0)
    with ExitStack() as stack:
        for kind in (JITFunction, InterpretedFunction):
            stack.enter_context(patch.object(kind, "run", lambda self, *args, **options: None))
        stack.enter_context(
            patch.object(torch.cuda, "get_device_properties", lambda device: properties)
        )
        stack.enter_context(patch.object(torch.cuda, "current_device", lambda: 0))
        stack.enter_context(patch.object(F, "conv2d", _conv2d))
        stack.enter_context(patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(torch.inference_mode())
        for known in (launch._known, quantize.hadamard):  # what is cached of it is fake too
            known.cache_clear()
            stack.callback(known.cache_clear)
        yield


def on_fake_gpu(module: Module) -> Module:
    """A copy of a module whose parameters and buffers are fake ones, where there is no memory."""
    found = copy(module)
    found._parameters = {name: _fake(old, True) for name, old in module._parameters.items()}
    found._buffers = {name: _fake(old, False) for name, old in module._buffers.items()}
    found._modules = {
        name: None if part is None else on_fake_gpu(part) for name, part in module._modules.items()
    }
    return found


def _fake(old: Tensor | None, parameter: bool) -> Any:
    if old is None:
        return None
    layout = torch.channels_last if old.dim() == 4 else torch.contiguous_format
    new = torch.empty(old.shape, dtype=old.dtype, device=CUDA, memory_format=layout)
    return torch.nn.Parameter(new, requires_grad=False) if parameter else new
