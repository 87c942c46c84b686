"""Compiles every kernel for Hopper at the released model's sizes, which needs no GPU, and prints
registers, spilled bytes and loads of 16 bytes as JSON. A program of its own: Triton must not be
interpreting.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from krea2_srt.kernels.channel_norm import channel_norm_triton
from krea2_srt.kernels.operations import TRITON
from krea2_srt.kernels.quantize import TokenFormat
from krea2_srt.kernels.token_rows import TokenRows

TARGET = GPUTarget("cuda", 90, 32)
HIDDEN, MLP, HEADS, KV_HEADS, TOKENS, ROWS = 6144, 16384, 48, 12, 8, 2


def compiled(kernel: JITFunction, args: tuple, options: dict) -> dict[str, int]:
    """Registers and spilled bytes of a kernel, launched with these arguments."""
    names = kernel.arg_names
    constexprs = {name: options[name] for name in names if name in options}
    signature, attributes = {}, {}
    for position, name in enumerate(names):
        if name in constexprs:
            signature[name] = "constexpr"
            continue
        value = args[position]
        if isinstance(value, torch.Tensor):
            signature[name] = triton.runtime.jit.mangle_type(value)
            divisible = not kernel.params[position].do_not_specialize_on_alignment
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            free = kernel.params[position].do_not_specialize
            divisible = isinstance(value, int) and value % 16 == 0 and not free
        if divisible:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, attributes)
    built = triton.compile(source, target=TARGET, options={"num_warps": options["num_warps"]})
    wide = re.findall(r"ld\.global[.\w]*\.v4\.b32|cp\.async\.cg[^;]*, 0x10,", built.asm["ptx"])
    found = {"warps": options["num_warps"], "wide_loads": len(wide)}
    return resources(built.asm["cubin"]) | found


def resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    stack = sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", text)))
    return {"registers": int(re.findall(r"REG:(\d+)", text)[0]), "spilled_bytes": stack}


def launches():
    """(name, function that launches) of every variant that serves."""
    bf16, rows = torch.bfloat16, TokenRows(torch.zeros(TOKENS, dtype=torch.int32), None)
    x, branch = (torch.zeros(TOKENS, HIDDEN, dtype=bf16) for _ in range(2))
    table = torch.zeros(ROWS, 28, 2, HIDDEN)[:, 3, 1]
    gate = table.to(bf16)
    fused = torch.zeros(TOKENS, 2 * (HEADS + KV_HEADS) * 128, dtype=bf16)
    scale, rope = torch.ones(128), torch.ones(TOKENS, 64, dtype=torch.complex64)
    weight, bias = torch.zeros(64, HIDDEN, dtype=bf16), torch.zeros(64, dtype=bf16)
    patches, index = torch.zeros(TOKENS, 64), rows.index
    do, eps = TRITON, 1e-5
    for name, format in (
        ("", None),
        (" fp8", TokenFormat()),
        (" fp8 rotated", TokenFormat(rotation=64)),
    ):
        yield f"norm{name}", lambda f=format: do.norm_scale_shift(x, table, table, rows, eps, f)
        yield (
            f"gated norm{name}",
            lambda f=format: do.add_gated_norm(x, gate, branch, table, table, rows, eps, f),
        )
        yield f"sigmoid gate{name}", lambda f=format: do.sigmoid_gate(x, fused[:, -HIDDEN:], f)
        yield (
            f"silu mul{name}",
            lambda f=format: do.silu_mul(torch.zeros(TOKENS, 2 * MLP, dtype=bf16), f),
        )
    yield "add gated", lambda: do.add_gated(x, gate, branch, rows)
    yield (
        "qk norm rope",
        lambda: do.qk_norm_rope(fused, scale, scale, rope, HEADS, KV_HEADS, eps),
    )
    yield "final layer", lambda: do.final_layer(x, table, table, rows, eps, weight, bias)
    yield (
        "euler",
        lambda: do.euler_step(
            patches, patches.to(bf16), index, index, table[0], table[0], patches, index
        ),
    )
    for channels in (96, 192, 384):
        image = torch.zeros(1, channels, 8, 8, dtype=bf16)
        image = image.contiguous(memory_format=torch.channels_last)
        gamma = torch.zeros(channels, 1, 1, dtype=bf16)
        yield f"channel norm {channels}", lambda i=image, g=gamma: channel_norm_triton(i, g, True)


def main() -> None:
    found: dict[str, dict[str, int]] = {}
    recorded: list[tuple[JITFunction, tuple, dict]] = []
    JITFunction.run = lambda self, *args, grid, warmup, **options: recorded.append(
        (self, args, options)
    )
    for name, launch in launches():
        launch()
        (call,) = recorded
        recorded.clear()
        found[name] = compiled(*call)
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
