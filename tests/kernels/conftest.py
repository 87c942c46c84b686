"""Kernels run in Triton's interpreter here; see also tests/conftest.py."""

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    convert = interpreter._convert_float

    def convert_to_fp8(data, source, target, rounding):
        # The interpreter's own conversion loses the carry of 1.99 to 2.0, and gives 1.0.
        if target != tl.float8e4nv or source != tl.float32:
            return convert(data, source, target, rounding)
        values = torch.from_numpy(data.astype("float32")).to(torch.float8_e4m3fn)
        return values.view(torch.uint8).numpy().reshape(data.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert_to_fp8)
    dot = interpreter.InterpreterBuilder.create_dot

    def dot_of_bf16(self, a, b, *rest):
        # The interpreter's own multiplies the bits of bf16 numbers, taken for whole numbers.
        a, b = (self.cast_impl(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_of_bf16)
