"""Measure the model on a GPU: kernels, attention, steps, VAE, text encoder and whole pictures.

Under 8 minutes on an H200, on a machine that has torch, triton, transformers and safetensors, and
no network. Every figure is given as a share of what the hardware allows.
"""

import platform
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:  # python benchmarks/gpu.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import tune_kernels
from benchmarks.arguments import benchmark_parser
from benchmarks.on_gpu import (
    attention,
    ceilings,
    correctness,
    kernel_bandwidth,
    memory,
    pictures,
    precision,
    report,
    steps,
    text,
    vae,
)
from benchmarks.on_gpu.context import Context, Part
from krea2_srt.kernels.launch import config_file

PARTS: dict[str, Part] = {
    "correctness": correctness.run,
    "ceilings": ceilings.run,
    "kernels": kernel_bandwidth.run,
    "attention": attention.run,
    "steps": steps.run,
    "vae": vae.run,
    "text": text.run,
    "pictures": pictures.run,
    "memory": memory.run,
    "precision": precision.run,
}


def main(argv: list[str] | None = None) -> int:
    """Run the parts; returns 1 if one failed."""
    parser = benchmark_parser("benchmarks.gpu", __doc__)
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, metavar="PART", help=f"some of: {', '.join(PARTS)}"
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="search the launches of the kernels first, and write them beside the results",
    )
    parser.add_argument(
        "--plan", action="store_true", help="measure nothing: write the targets as not measured"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="try the program on the CPU, with a tiny model"
    )
    args = parser.parse_args(argv)
    if args.plan:
        report.write(args.output, None, {})
        return 0
    if not args.smoke and not torch.cuda.is_available():
        parser.error("no CUDA GPU; --smoke tries the program, --plan writes what would be measured")
    device = torch.device("cpu" if args.smoke else "cuda")
    context = Context(device, args.smoke)
    if args.tune:
        with torch.inference_mode():
            found = tune_kernels.search(context)
        name = machine(device)["device"]
        tune_kernels.store(found, args.output / config_file(name).name, name)
    for name in args.only or PARTS:
        start = time.perf_counter()
        with context.findings.attempt(name), torch.inference_mode():
            PARTS[name](context)
        seconds = time.perf_counter() - start
        print(f"{name}: {seconds:.1f} s", file=sys.stderr, flush=True)
        # After every part, so that a time limit loses nothing.
        report.write(args.output, context.findings, machine(device))
    print(report.markdown(context.findings, machine(device)))
    return 1 if context.findings.failures else 0


def machine(device: torch.device) -> dict[str, Any]:
    """What was measured on, and with what."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, a trial"
    import triton

    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    sys.exit(main())
