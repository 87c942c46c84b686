"""The parts of the benchmark, the most valuable first, and how long each takes on an H200.

No GPU was at hand when the seconds were written: they are arithmetic, with the releases' sizes and
with rates below what the GPU is said to reach. A budget goes by them; deadlines leave room.
"""

from collections.abc import Callable
from dataclasses import dataclass

from krea2_bench.gpu import (
    adapters,
    attention,
    baselines,
    beside,
    ceilings,
    correctness,
    equality,
    fused,
    gemm,
    kernel_bandwidth,
    memory,
    pictures,
    precision,
    steps,
    text,
    vae,
)
from krea2_bench.gpu.budget import PartPlan
from krea2_bench.gpu.context import Context

IMPORTS_S = 12.0
"""Seconds of the parent's imports: torch and Triton from a disk that has never read them."""

CONTEXT_S = 4.0
"""Seconds of every child's start: a fork, a CUDA context (3 to 5 s), and handles of cuBLAS and
cuDNN.
"""

TRANSFORMERS_S = 8.0
"""To import transformers, in a child, since it asks CUDA for its devices."""

DIT_S = 5.0
"""12 billion random numbers are a second; the race of attention three; the first launches one."""

FP8_S = 3.0
"""A quantised copy: 24 GB read, 12 GB written, in pieces of 2048 rows."""

TEXT_S, VAE_S = 1.5, 1.0
"""4 billion random numbers, and the VAE's."""

KERNEL_S = 1.2
"""To build one Triton kernel; children share what was built on the disk."""


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        run: measures, and leaves rows with the findings.
        group: those of one share a child, see `START_S`.
        seconds: by estimate, its child's start not counted.
        first_call: whether it belongs to what the first ten minutes with a GPU must answer.
    """

    run: Callable[[Context], None]
    group: str
    seconds: float
    first_call: bool = True

    @property
    def deadline_s(self) -> float:
        """After which it is taken to hang: the estimate may be off, or a kernel may not end."""
        return 15.0 + 2.0 * self.seconds


START_S = {
    "kernels": CONTEXT_S,
    "steps": CONTEXT_S + DIT_S,
    "text": CONTEXT_S + TRANSFORMERS_S + DIT_S + TEXT_S,
    "vae": CONTEXT_S + VAE_S,
    "beside": CONTEXT_S + DIT_S + VAE_S,
    "pictures": CONTEXT_S + TRANSFORMERS_S + DIT_S + 2 * FP8_S + TEXT_S + VAE_S,
    "fused": CONTEXT_S,
    "packs": CONTEXT_S + DIT_S,
    "compile": CONTEXT_S + DIT_S,
    "vae 3-D": CONTEXT_S + VAE_S,
    "precision": CONTEXT_S + TRANSFORMERS_S + DIT_S + 2 * FP8_S + TEXT_S + VAE_S,
}
"""Seconds before a child can run the first part of its group."""

PARTS: dict[str, Part] = {
    # 18 kernels to build; float64 of the largest is 4 GB, read a dozen times at 2 TB/s.
    "correctness": Part(correctness.run, "kernels", 18 * KERNEL_S + 3),
    # Four of half a second and as much warm-up, and 12 GB to fill.
    "ceilings": Part(ceilings.run, "kernels", 4),
    # 76 products of 0.08 s and as much warm-up, operands, plans; and two of two seconds.
    "gemm": Part(gemm.run, "kernels", 76 * 0.16 + 3 + 2 * 2.2),
    # Seven back ends on four packs, 0.3 s and as much warm-up; the exact result of 2048 x 2048 is
    # 6.7 TFLOP in float32 at 30 TFLOP/s; trials, captures, and plans of cuDNN.
    "attention": Part(attention.run, "kernels", 7 * 4 * 0.5 + 2 + 5),
    # 19 kernels, 0.15 s and as much warm-up, and their operands.
    "kernels": Part(kernel_bandwidth.run, "kernels", 19 * 0.35),
    # Four variants of kernels for short packs, and three steps of 1500 tokens in several ways.
    "equality": Part(equality.run, "steps", 4 * KERNEL_S + 1),
    # Nine steps of 2048 x 2048 at 0.88 s, twelve of 1024 x 1024 at 0.17 s, two captures of each,
    # a second or two of each of the small ones.
    "steps": Part(steps.run, "steps", 9 * 0.9 + 12 * 0.17 + 2 + 4),
    # The same at 0.66 s and 0.11 s, and five kernels with 8-bit outputs that were not built yet.
    "steps_8bit": Part(steps.run_8_bit, "steps", FP8_S + 9 * 0.7 + 12 * 0.12 + 2 + 3),
    # Three prompts, both ways, half a second and as much warm-up; three captures; one of a step.
    "text": Part(text.run, "text", 3 * 2 + 2 + 1),
    # 20 shapes of convolutions in each of three sizes; a search tries ten of each, the largest of
    # which take 2 ms, several times.
    "vae": Part(vae.run, "vae", 3 * 1.0 + 3 * 3.5),
    # Half a second of each, and five decodes of 0.2 s beside steps.
    "beside": Part(beside.run, "beside", 2 + 2),
    # Three formats, five pictures of 1.4 s and 0.9 s, as many of 512 and 256, captures.
    "pictures": Part(pictures.run, "pictures", 5 * 1.4 + 2 * 5 * 0.9 + 7, first_call=False),
    # Of 2048 x 2048 and 1024 x 1024 as in fp8.
    "steps_int8": Part(steps.run_int8, "pictures", 9 * 0.7 + 12 * 0.12 + 1, first_call=False),
    # A warm-up and two of 7 s and of 5.3 s.
    "pictures_2048": Part(pictures.run_large, "pictures", 2 * (7 + 5.3) + 3, first_call=False),
    # Four steps of 2048 x 2048, decodes, prompts, and ten captures.
    "memory": Part(memory.run, "pictures", 8, first_call=False),
    # Two products, both ways, at four sizes, and one of int8; three packs of attention; six kernels
    # to build, large ones, and the first cuts of an 8-bit product.
    "fused": Part(fused.run, "fused", 12 * 1.0 + 6 * 2 * KERNEL_S, first_call=False),
    # Ours twice and theirs, at 1.3 times the time; least three rounds and two warm-ups.
    "plain": Part(baselines.run, "packs", 5 * (0.9 * 2 + 1.2) + 5 * 0.6 + 4, first_call=False),
    "packs": Part(steps.run_packs, "packs", 8 * 4.5, first_call=False),
    # Two sizes, with and without, both ways; four captures, and two kernels for each matrix.
    "adapters": Part(adapters.run, "packs", 20 * 0.18 + 4 + 8 * KERNEL_S, first_call=False),
    # Three graphs of 30 s.
    "compile": Part(baselines.run_compiled, "compile", 3 * 30 + 6, first_call=False),
    # A guess: the first 3-D convolutions of a size.
    "vae_3d": Part(vae.run_3d, "vae 3-D", 45, first_call=False),
    "precision": Part(precision.run, "precision", 12, first_call=False),
}


def plans(names: list[str] | None = None, patience: float = 1.0) -> list[PartPlan]:
    """What has to be known of the parts to order them.

    Args:
        names: of some; None is all.
        patience: how much longer than on an H200 a part may take.
    """
    return [
        PartPlan(name, part.group, part.seconds, part.deadline_s * patience)
        for name, part in PARTS.items()
        if names is None or name in names
    ]


def start_s(group: str) -> float:
    """Seconds before a child can run the first part of a group."""
    return START_S[group]
