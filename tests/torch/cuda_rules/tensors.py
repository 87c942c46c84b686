"""Tensors on a device that is not there: shapes, strides and whose memory, but no values."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tests.torch.cuda_rules.memory import Handle, Memory, Span

if TYPE_CHECKING:
    from tests.torch.cuda_rules.machine import Machine

CUDA = torch.device("cuda", 0)


class DeviceTensor(torch.Tensor):
    """A tensor on ``cuda``. Views of one storage share its handle."""

    handle: Handle
    machine: "Machine"

    @staticmethod
    def of(
        machine: "Machine",
        handle: Handle,
        size: Any,
        stride: Any,
        offset: int,
        dtype: torch.dtype,
    ) -> "DeviceTensor":
        tensor: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            DeviceTensor, size, strides=stride, storage_offset=offset, dtype=dtype, device=CUDA
        )
        tensor.handle = handle
        tensor.machine = machine
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """An operation of a thread that was there before the rules were."""
        for tensor in tensors_of(args, kwargs or {}):
            if isinstance(tensor, DeviceTensor):
                return tensor.machine.dispatch(func, args, kwargs or {})
        raise AssertionError(func)

    @property
    def memory(self) -> Memory:
        return self.handle.memory

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype})"


def tensors_of(args: Any, kwargs: Any) -> list[Tensor]:
    """All tensors among arguments, in order."""
    found = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


def extent(size: Any, stride: Any) -> int:
    """Elements from the first to behind the last."""
    last = 0
    for count, step in zip(size, stride, strict=True):
        if count == 0:
            return 0
        last += (count - 1) * step
    return last + 1


def span(tensor: Tensor) -> Span:
    """Bytes of its storage that a tensor lies in."""
    start = tensor.storage_offset() * tensor.dtype.itemsize
    return start, start + extent(tensor.shape, tensor.stride()) * tensor.dtype.itemsize


@dataclass(frozen=True)
class Output:
    """One result of an operation.

    Attributes:
        same: the number of the tensor among the arguments that is returned as it is.
        view: of which one it is a view.
        size, stride, offset, dtype: of it; the offset of a view counts from its base's.
    """

    same: int | None
    view: int | None
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


def meta(tensor: Tensor) -> Tensor:
    """The same on the meta device; a number on the host stays what it is."""
    if not isinstance(tensor, DeviceTensor) and tensor.dim() == 0:
        return tensor
    size, stride = tensor.shape, tensor.stride()
    base = torch.empty(extent(size, stride), dtype=tensor.dtype, device="meta")
    return base.as_strided(size, stride)


class Shapes:
    """What operations return, worked out once on meta tensors for all arguments of a form."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[list[Output | None], bool]] = {}

    def outputs(
        self, func: Any, args: Any, kwargs: dict[str, Any]
    ) -> tuple[list[Output | None], bool]:
        """Outputs of an operation, and whether they are a list or a tuple of their own."""
        key = (func, *map(_form, args), *((k, _form(v)) for k, v in kwargs.items()))
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._infer(func, args, kwargs)
        return found

    def _infer(
        self, func: Any, args: Any, kwargs: dict[str, Any]
    ) -> tuple[list[Output | None], bool]:
        metas: list[Tensor] = []

        def convert(value: Any) -> Any:
            if isinstance(value, Tensor):
                metas.append(meta(value))
                return metas[-1]
            if isinstance(value, (list, tuple)):
                return type(value)(map(convert, value))
            if isinstance(value, torch.device):
                return torch.device("meta")
            return value

        args = [convert(value) for value in args]
        kwargs = {name: convert(value) for name, value in kwargs.items()}
        storages = [tensor.untyped_storage()._cdata for tensor in metas]
        result = func(*args, **kwargs)
        several = isinstance(result, (list, tuple))
        found: list[Output | None] = []
        for out in result if several else [result]:
            if not isinstance(out, Tensor):
                found.append(None)
                continue
            same = next((i for i, tensor in enumerate(metas) if tensor is out), None)
            storage = out.untyped_storage()._cdata
            view = storages.index(storage) if storage in storages else None
            found.append(
                Output(same, view, tuple(out.shape), out.stride(), out.storage_offset(), out.dtype)
            )
        return found, several


def _form(value: Any) -> Any:
    """All of an argument that results may depend on."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype, isinstance(value, DeviceTensor))
    if isinstance(value, (list, tuple)):
        return tuple(map(_form, value))
    if isinstance(value, torch.Generator):
        return None
    return (type(value), value)
