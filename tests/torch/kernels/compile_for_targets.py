"""Compiles every kernel for each kind of GPU at the released model's sizes, which needs no GPU, and
prints registers, spilled bytes, shared memory and loads of 16 bytes as JSON. A program of its own:
Triton must not be interpreting.

    python -m tests.torch.kernels.compile_for_targets [--target 80 90 ...]
"""

import argparse
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from krea2_srt.kernels import attention, products
from krea2_srt.kernels.channel_norm import channel_norm_triton
from krea2_srt.kernels.lora import lora_expand_triton, lora_shrink_triton
from krea2_srt.kernels.operations import TRITON
from krea2_srt.kernels.quantize import QuantizedTokens, TokenFormat, quantize_tokens_triton
from krea2_srt.kernels.quantize_heads import quantize_qkv_triton
from krea2_srt.kernels.segment_index import SegmentIndex
from krea2_srt.model.quantization import DTYPES

SHARED_LIMIT = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that a block may have, by compute capability (CUDA programming guide)."""

FP8_FROM = 89
"""The first capability that has e4m3."""

PROCESSES = 2

HIDDEN, MLP, HEADS, KV_HEADS, TOKENS, ROWS = 6144, 16384, 48, 12, 8, 2

KV = KV_HEADS * 128
ADAPTED = {
    "qkvg": (HIDDEN, (0, HIDDEN, HIDDEN + KV, HIDDEN + 2 * KV), 2 * (HIDDEN + KV)),
    "gate up": (HIDDEN, (0, MLP), 2 * MLP),
    "down": (MLP, (0,), HIDDEN),
    "img in": (64, (0,), HIDDEN),
    "final": (HIDDEN, (0,), 64),
}
"""Matrices beside which adapters lie: their width, where their parts begin and end."""


Call = tuple[JITFunction, tuple, dict]
"""A kernel, what it was launched with, and its options."""


WIDE = re.compile(
    r"ld\.global[.\w:]*\.v(?:[48]\.b32|2\.b64)|cp\.async\.cg[^;]*, 0x10,|cp\.async\.bulk\.tensor"
)
"""Loads of 16 bytes and more."""

TENSOR_CORES = re.compile(r"(wgmma|tcgen05|mma)\.(?:mma_async|mma|sync)")


def compiled(call: Call, target: int) -> dict[str, Any]:
    """What a kernel takes of a processor, launched so on a target."""
    kernel, args, options = call
    names = kernel.arg_names
    constexprs = {name: options[name] for name in names if name in options}
    signature, attributes = {}, {}
    for position, name in enumerate(names):
        if name in constexprs:
            signature[name] = "constexpr"
            continue
        value = args[position]
        if isinstance(value, TensorDescriptor):
            element = triton.runtime.jit.mangle_type(value.base).removeprefix("*")
            signature[name] = f"tensordesc<{element}{value.block_shape}>"
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = triton.runtime.jit.mangle_type(value)
            divisible = not kernel.params[position].do_not_specialize_on_alignment
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            free = kernel.params[position].do_not_specialize
            divisible = isinstance(value, int) and value % 16 == 0 and not free
        if divisible:
            attributes[(position,)] = [["tt.divisibility", 16]]
    built = triton.compile(
        ASTSource(kernel, signature, constexprs, attributes),
        target=GPUTarget("cuda", target, 32),
        options={name: options[name] for name in ("num_warps", "num_stages") if name in options},
    )
    ptx = built.asm["ptx"]
    return resources(built.asm["cubin"]) | {
        "warps": options["num_warps"],
        "wide_loads": len(WIDE.findall(ptx)),
        "tensor_cores": sorted(set(TENSOR_CORES.findall(ptx))),
        "shared_bytes": built.metadata.shared,
        "shared_limit": SHARED_LIMIT[target] * 1024,
    }


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
    bf16, rows = torch.bfloat16, SegmentIndex(torch.zeros(TOKENS, dtype=torch.int32), None)
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
        (" fp8 rotated", TokenFormat(rotation=256)),
        (" int8", TokenFormat(torch.int8)),
        (" int8 rotated", TokenFormat(torch.int8, 256)),
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
        if format is not None:
            yield (
                f"quantize{name}",
                lambda f=format: quantize_tokens_triton(torch.zeros(TOKENS, MLP, dtype=bf16), f),
            )
    for name, dtype in (("", bf16), (" fp8", torch.float8_e4m3fn), (" int8", torch.int8)):
        matrix, ones = torch.empty(2 * MLP, HIDDEN, dtype=dtype), torch.ones(2 * MLP, 1)
        tokens = x if dtype is bf16 else QuantizedTokens(x.to(dtype), ones[:TOKENS])
        yield (
            f"swiglu product{name}",
            lambda t=tokens, m=matrix, s=ones: products.swiglu_product_triton(
                t, m, s if m.dtype is not bf16 else None, bf16
            ),
        )
        if dtype is not bf16:
            yield (
                f"product{name}",
                lambda t=tokens, m=matrix, s=ones: products.scaled_product_triton(t, m, s, bf16),
            )
    widths = [HEADS * 128, KV_HEADS * 128, KV_HEADS * 128, HEADS * 128]
    *qkv, output_gate = fused.split(widths, dim=1)
    q, k, v = (some.unflatten(1, (-1, 128)) for some in qkv)
    for name, some_gate in (("attention", None), ("gated attention", output_gate)):
        yield name, lambda g=some_gate: attention.gated_attention_triton(q, k, v, g, index)
    yield "quantize qkv fp8", lambda: quantize_qkv_triton(q, k, v, torch.tensor([0, TOKENS]).int())
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


def lora_launches():
    """The same of adapters: of the matrices with the most and the fewest columns at each rank, of
    the others at one.
    """
    slots, scales = torch.zeros(ROWS, 4, dtype=torch.int32), torch.ones(ROWS, 4)
    index = torch.zeros(TOKENS, dtype=torch.int32)
    for matrix, (width, starts, columns) in ADAPTED.items():
        for rank in (16, 32, 64, 128) if matrix in ("qkvg", "down") else (32,):
            parts = len(starts)
            down, up = (
                torch.empty(2, *shape, dtype=torch.bfloat16)
                for shape in ((parts * rank, width), (columns, rank))
            )
            x = torch.empty(TOKENS, width, dtype=torch.bfloat16)
            name = f"{matrix} rank {rank}"
            yield f"lora shrink {name}", partial(lora_shrink_triton, x, down, index, slots, parts)
            for format, dtype in DTYPES.items():
                quantized = QuantizedTokens(x.to(dtype), torch.ones(TOKENS, 1))
                yield (
                    f"lora shrink {format} {name}",
                    partial(lora_shrink_triton, quantized, down, index, slots, parts),
                )
            h = torch.empty(TOKENS, 4, parts * rank, dtype=torch.bfloat16)
            out = torch.empty(TOKENS, columns, dtype=torch.bfloat16)
            yield (
                f"lora expand {name}",
                partial(lora_expand_triton, out, h, up, index, slots, scales, starts),
            )


def recorded(target: int) -> dict[str, Call]:
    """Every variant's call as for a target, which is not made."""
    for module in (attention, products):
        module.tiles_of = lambda device, m=module: m.TILES.get(divmod(target, 10), m.SMALL)
    calls: dict[str, Call] = {}
    made: list[Call] = []
    JITFunction.run = lambda self, *args, grid, warmup, **options: made.append(
        (self, args, options)
    )
    for name, launch in chain(launches(), lora_launches()):
        launch()
        for number, call in enumerate(made, 1):
            calls[name if len(made) == 1 else f"{name} {number}"] = call
        made.clear()
    return calls


CALLS: dict[int, dict[str, Call]] = {}
"""What `main` recorded, for the processes that it forks."""


def compile_one(job: tuple[int, str]) -> tuple[int, str, dict[str, Any]]:
    target, name = job
    return target, name, compiled(CALLS[target][name], target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    known = list(SHARED_LIMIT)
    parser.add_argument("--target", type=int, nargs="+", choices=known, default=known)
    targets = parser.parse_args().target
    CALLS.update({target: recorded(target) for target in targets})
    jobs = [
        (target, name)
        for target in targets
        for name in CALLS[target]
        if target >= FP8_FROM or "fp8" not in name
    ]
    found: dict[int, dict[str, dict[str, Any]]] = {target: {} for target in targets}
    with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
        for target, name, resources in pool.imap(compile_one, jobs):
            found[target][name] = resources
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
