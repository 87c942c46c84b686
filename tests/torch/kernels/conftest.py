"""Kernels run in Triton's interpreter here; see also tests/conftest.py."""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    convert = interpreter._convert_float

    formats = {
        tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8),
        tl.bfloat16: (torch.bfloat16, torch.uint16),
    }

    def convert_as_a_gpu(data, source, target, rounding):
        # The interpreter's own conversion loses the carry of 1.99 to 2.0 in fp8, and gives 1.0; to
        # bf16 it cuts where a GPU rounds.
        if target not in formats or source != tl.float32:
            return convert(data, source, target, rounding)
        dtype, bits = formats[target]
        values = torch.from_numpy(data.astype("float32")).to(dtype)
        return values.view(bits).numpy().reshape(data.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert_as_a_gpu)
    cast_integers = interpreter.InterpreterBuilder.create_si_to_fp

    def integers_to_bf16(self, source, target):
        # The interpreter's own takes a whole number for the bits of the bf16 number.
        if target.scalar == tl.bfloat16:
            return self.cast_impl(cast_integers(self, source, tl.float32), target)
        return cast_integers(self, source, target)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_si_to_fp", integers_to_bf16)
    dot = interpreter.InterpreterBuilder.create_dot

    def dot_of_bf16(self, a, b, *rest):
        # The interpreter's own multiplies the bits of bf16 numbers, taken for whole numbers.
        a, b = (self.cast_impl(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_of_bf16)
    reduce = interpreter.ReduceOps.generic_reduce

    def xor_of_all(self, arguments):
        # The interpreter's own goes from number to number: a second and more to rotate a token.
        if self.combine_fn is not tl.standard._xor_combine:
            return reduce(self, arguments)
        (x,) = arguments
        found = np.bitwise_xor.reduce(x.handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(found, x.dtype)

    monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", xor_of_all)


@pytest.fixture
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel leaves unwritten holds NaNs, or the largest byte in fp8."""
    new_empty, empty = torch.Tensor.new_empty, torch.empty

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(torch.uint8).fill_(255).view(tensor.dtype)

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
