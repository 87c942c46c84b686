"""What this GPU does at best: a large matrix product and a large copy."""

import torch

from krea2_bench.gpu.context import Context
from krea2_bench.gpu.rows import Row, rate
from krea2_bench.gpu.timing import timings


def run(context: Context) -> None:
    """Memory that is free; matmul in every format, and a copy; of random data: zeros run faster."""
    device, findings, smoke = context.device, context.findings, context.smoke
    if context.on_gpu:
        free, _ = torch.cuda.mem_get_info(device)
        findings.add(Row("ceilings", "free memory", free / 2**30, "GiB", better="more"))
    seconds = context.seconds / 2
    size = 128 if smoke else 8192
    generator = torch.Generator(device).manual_seed(0)

    def random() -> torch.Tensor:
        return torch.randn(size, size, generator=generator, device=device, dtype=context.dtype)

    a, b = random(), random()
    flops = 2 * size**3
    (product,) = timings([lambda: a @ b], device, seconds)
    findings.add(rate("ceilings", "matmul bf16", flops / 1e9, product, "TFLOP/s"))
    count = 2**20 if smoke else 2**30
    source = torch.randn(count, device=device, generator=generator, dtype=torch.float32)
    target = torch.empty_like(source)
    (copy,) = timings([lambda: target.copy_(source)], device, seconds)
    findings.add(rate("ceilings", "copy", 2 * source.nbytes / 1e6, copy, "GB/s"))
    if not context.on_gpu:
        return
    with findings.attempt("ceilings", "matmul fp8"):
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        one = torch.ones((), device=device)

        def scaled() -> torch.Tensor:
            # One scale each: those of rows may be slower, see the matrix shapes.
            return torch._scaled_mm(
                a8,
                b8.t(),
                scale_a=one,
                scale_b=one,
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )

        (product,) = timings([scaled], device, seconds)
        findings.add(rate("ceilings", "matmul fp8", flops / 1e9, product, "TFLOP/s"))
        del a8, b8
    with findings.attempt("ceilings", "matmul int8"):
        a8, b8 = (
            torch.randint(-127, 128, (size, size), device=device, dtype=torch.int8)
            for _ in range(2)
        )
        (product,) = timings([lambda: torch._int_mm(a8, b8.t())], device, seconds)
        findings.add(rate("ceilings", "matmul int8", flops / 1e9, product, "TFLOP/s"))
