"""What this GPU does at best: a large matrix product and a large copy."""

import torch

from benchmarks.on_gpu.context import Context
from benchmarks.on_gpu.rows import Row
from benchmarks.on_gpu.timing import timings


def run(context: Context) -> None:
    """Matmul in bf16 and fp8, and a copy, on random data: zeros run faster."""
    device, add = context.device, context.findings.rows.append
    size = 128 if context.smoke else 8192
    generator = torch.Generator(device).manual_seed(0)

    def random() -> torch.Tensor:
        return torch.randn(size, size, generator=generator, device=device, dtype=context.dtype)

    a, b = random(), random()
    flops = 2 * size**3
    (product,) = timings([lambda: a @ b], device, context.seconds)
    add(_rate("matmul bf16", flops / 1e9, product, "TFLOP/s"))
    if device.type == "cuda":
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        ones = torch.ones(size, 1, device=device)

        def scaled() -> torch.Tensor:
            return torch._scaled_mm(
                a8,
                b8.t(),
                scale_a=ones,
                scale_b=ones.t(),
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )

        (product,) = timings([scaled], device, context.seconds)
        add(_rate("matmul fp8", flops / 1e9, product, "TFLOP/s"))
    count = 2**20 if context.smoke else 2**30
    source = torch.randn(count, device=device, generator=generator, dtype=torch.float32)
    target = torch.empty_like(source)
    (copy,) = timings([lambda: target.copy_(source)], device, context.seconds)
    add(_rate("copy", 2 * source.nbytes / 1e6, copy, "GB/s"))


def _rate(what: str, amount: float, timing, unit: str) -> Row:
    low, high = amount / timing.high, amount / timing.low
    return Row("ceilings", what, amount / timing.median, unit, low, high, better="more")
