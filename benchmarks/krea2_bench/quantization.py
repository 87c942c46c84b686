"""How far 8 bits are from bf16: of one product, of attention, of every step, and of a picture; and
how long a step takes.

Errors take a minute on two cores, and times two, which nobody else should use then.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from krea2_bench import quantized_steps
from krea2_bench.arguments import benchmark_parser
from krea2_bench.eight_bits import FORMATS
from krea2_srt.kernels.quantize import TokenFormat, quantize_tokens, rotation_block
from krea2_srt.kernels.quantize_heads import quantize_qkv
from krea2_srt.model.attention import VarlenAttention, sdpa_attention
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.model.pack import Segments
from krea2_srt.model.quantization import DTYPES, SERVED, QuantizedLinear
from krea2_srt.request import ImageRequest
from krea2_srt.runner.attention_trial import HEAD_DIM, HEADS, KV_HEADS, exact_attention
from krea2_srt.runner.device_state import DeviceState
from krea2_srt.runner.fp8_attention import emulated_flash_attention_3, fp8_attention
from krea2_srt.runner.model_runner import Krea2Runner

CPU = torch.device("cpu")
PRODUCTS = {"6144 wide": 6144, "16384 wide": 16384}
"""Inputs of the released matrices."""

ROWS, TOKENS = 512, 64

ATTENTION_TOKENS = 1088
"""Tokens of one image of 512 x 512 with its prompt."""

ATTENTION: dict[str, VarlenAttention] = {
    "bf16": sdpa_attention,
    "fa3_fp8": fp8_attention(lambda: emulated_flash_attention_3, quantize_qkv),
}
SIDE, STEPS = 256, 8
PROMPT = "a red fox sitting in fresh snow, golden hour, photorealistic"

_PAGE = """\
# Errors and times of 8-bit matrices

Written by `python -m krea2_bench.quantization` on a CPU. int8 is with a Hadamard rotation of the
inputs, as it is served, fp8 without; `int8_unrotated` and `fp8_rotated` are there to show what the
rotation does. Weights have a scale per output channel, tokens a scale each.

## One product

|product - exact| / |exact|, with the exact one in float64, of random weights of the released
widths. *Gaussian* tokens; *heavy tails* are Student's t with 3 degrees of freedom; *outliers* are
Gaussian with one channel in a hundred 30 times as large, as those of large transformers are.

{products}{attention}{steps}
## The demo checkpoint

It is tiny: these figures say that the mode works, and nothing of the released model's pictures.
{sizes}. The error of a step is that of the velocity on the same
tokens, against bf16.

{pictures}
Published FP8 versions of Krea 2 Turbo itself are at a PSNR of 23.6 dB to bf16 (LPIPS 0.12), an
int8 version with rotation at 27.7 dB (0.066). Ours on the released weights: not measured.
"""


_ATTENTION = """
## Attention

The same of attention over {tokens} tokens with the released heads, in bf16 and in fp8 as
FlashAttention-3 has it (`KREA2_SRT_ATTENTION=fa3_fp8`): queries, keys, values and weights in e4m3,
with a scale per image and key/value head. An emulation of what its kernel rounds; Hopper's fp8
products keep fewer bits of their sums than it does. Queries and keys are normalised per head, as
the model's are.

{rows}"""


def product_errors() -> Iterator[dict[str, Any]]:
    """Errors of one matrix multiplication, by width, distribution of the tokens, and format."""
    generator = torch.Generator().manual_seed(0)
    for matrix, width in PRODUCTS.items():
        weight = torch.randn(ROWS, width, generator=generator) * width**-0.5
        for kind, tokens in _tokens(width, generator, TOKENS):
            exact = tokens.double() @ weight.double().T
            for name, quantization in FORMATS.items():
                rotation = rotation_block(width) if quantization.rotation else 0
                format = TokenFormat(DTYPES[quantization.format], rotation)
                linear = QuantizedLinear(width, {"w": ROWS}, torch.float32, format)
                (slot,) = (slot for _, slot in linear.weight_map(""))
                assert slot.store is not None
                slot.store(weight)
                got = linear(quantize_tokens(tokens, format))
                yield {
                    "matrix": matrix,
                    "tokens": kind,
                    "format": name,
                    "error": _relative(got, exact),
                }


def attention_errors() -> Iterator[dict[str, Any]]:
    """Errors of attention, by distribution of the projection's outputs, and format."""
    generator = torch.Generator().manual_seed(0)
    heads = [HEADS, KV_HEADS, KV_HEADS]
    segments = Segments.of([ATTENTION_TOKENS], CPU)
    for kind, tokens in _tokens(sum(heads) * HEAD_DIM, generator, ATTENTION_TOKENS):
        q, k, v = tokens.unflatten(1, (-1, HEAD_DIM)).split(heads, dim=1)
        q, k = (F.rms_norm(x, (HEAD_DIM,)) for x in (q, k))
        q, k, v = (x.bfloat16() for x in (q, k, v))
        exact = exact_attention(q, k, v, segments)
        for name, attend in ATTENTION.items():
            error = _relative(attend(q, k, v, segments), exact)
            yield {"tokens": kind, "format": name, "error": error}


def _tokens(width: int, generator: torch.Generator, count: int) -> Iterator[tuple[str, Tensor]]:
    gaussian = torch.randn(count, width, generator=generator)
    yield "Gaussian", gaussian
    chi = torch.randn(count, width, 3, generator=generator).square().sum(-1) / 3
    yield "heavy tails", torch.randn(count, width, generator=generator) / chi.sqrt()
    outliers = gaussian.clone()
    channels = torch.randperm(width, generator=generator)[: width // 100]
    outliers[:, channels] *= 30
    yield "outliers", outliers


def picture_errors(model: Path) -> Iterator[dict[str, Any]]:
    """Errors of every step and of the picture, by format and by what is kept."""
    checkpoint = Krea2Checkpoint.from_folder(model)
    reference = Krea2Runner.load(checkpoint, CPU, torch.bfloat16)
    last = reference.num_blocks - 1
    ends = ("0.*", f"{last}.*")
    kept = {
        f"{name}, first and last block kept": replace(served, keep=ends)
        for name, served in SERVED.items()
    }
    expected = _generate(reference)
    for name, quantization in (FORMATS | kept).items():
        runner = Krea2Runner.load(checkpoint, CPU, torch.bfloat16, quantization=quantization)
        errors = _step_errors(runner, reference)
        difference = (_generate(runner) - expected).double().square().mean()
        yield {
            "format": name,
            "step_errors": errors,
            "psnr": (-10 * torch.log10(difference)).item(),
        }


def _start(runner: Krea2Runner) -> DeviceState:
    image = ImageRequest(PROMPT, SIDE, SIDE, STEPS)
    state = runner.start(image, runner.encode(image.prompts))
    state.sequence.wants_previews = True  # keeps its velocities
    return state


def _generate(runner: Krea2Runner) -> Tensor:
    state = _start(runner)
    while not state.done:
        runner.step([state])
    return runner.decode(state)


def _step_errors(runner: Krea2Runner, reference: Krea2Runner) -> list[float]:
    """Errors of the velocity in every step, from the tokens that the reference has come to."""
    theirs, ours, errors = _start(reference), _start(runner), []
    while not theirs.done:
        ours.tokens, ours.sequence.step = theirs.tokens, theirs.step
        runner.step([ours])
        reference.step([theirs])
        assert ours.velocity is not None
        assert theirs.velocity is not None
        errors.append(_relative(ours.velocity, theirs.velocity))
    return errors


def _relative(got: Tensor, expected: Tensor) -> float:
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / expected.norm()).item()


def page(
    products: list[dict[str, Any]],
    pictures: list[dict[str, Any]],
    attention: Sequence[dict[str, Any]] = (),
    steps: dict[str, Any] | None = None,
) -> str:
    """The tables; without those of attention and of times if they were not measured."""
    lines = [["matrix", "tokens", *FORMATS]]
    for matrix, kind in dict.fromkeys((row["matrix"], row["tokens"]) for row in products):
        errors = {
            row["format"]: row["error"]
            for row in products
            if (row["matrix"], row["tokens"]) == (matrix, kind)
        }
        lines.append([matrix, kind, *(f"{errors[name]:.2%}" for name in FORMATS)])
    generated = [["format", "error of a step, first to last", "PSNR to bf16"]]
    for row in pictures:
        errors = row["step_errors"]
        generated.append(
            [row["format"], f"{errors[0]:.2%} to {errors[-1]:.2%}", f"{row['psnr']:.1f} dB"]
        )
    sizes = f"{SIDE}x{SIDE}, {STEPS} steps, one seed"
    return _PAGE.format(
        products=_table(lines),
        attention=_attention_section(attention) if attention else "",
        steps=quantized_steps.section(steps) if steps else "",
        pictures=_table(generated),
        sizes=sizes,
    )


def _attention_section(rows: Sequence[dict[str, Any]]) -> str:
    lines = [["tokens", *ATTENTION]]
    for kind in dict.fromkeys(row["tokens"] for row in rows):
        errors = {row["format"]: row["error"] for row in rows if row["tokens"] == kind}
        lines.append([kind, *(f"{errors[name]:.2%}" for name in ATTENTION)])
    return _ATTENTION.format(tokens=ATTENTION_TOKENS, rows=_table(lines))


def _table(lines: list[list[str]]) -> str:
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    rows.insert(1, "|" + " --- |" * len(lines[0]))
    return "\n".join(rows) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Measure, and write ``quantization.json`` and ``quantization.md``."""
    parser = benchmark_parser("krea2_bench.quantization", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the demo checkpoint")
    args = parser.parse_args(argv)
    with torch.inference_mode():
        products, attention = list(product_errors()), list(attention_errors())
        pictures = list(picture_errors(args.model))
        steps = quantized_steps.step_times()
    args.output.mkdir(parents=True, exist_ok=True)
    stored = {"products": products, "attention": attention, "pictures": pictures, "steps": steps}
    (args.output / "quantization.json").write_text(json.dumps(stored, indent=1) + "\n")
    (args.output / "quantization.md").write_text(page(products, pictures, attention, steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
