"""Search the launch of every kernel on this GPU, and store it where the kernels look for it.

Takes about a minute. Run it once per kind of GPU, and after a change of a kernel or of Triton.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.runtime.jit import JITFunction

from krea2_bench.arguments import benchmark_parser
from krea2_bench.gpu.context import Context
from krea2_bench.gpu.kernel_bandwidth import TOKENS
from krea2_bench.gpu.kernel_cases import Case, cases
from krea2_bench.gpu.timing import queued
from krea2_srt.errors import first_line
from krea2_srt.kernels.launch import DEFAULTS, FOLDER, Launch, config_file, device_of

WARPS = (4, 8, 16, 32)
TOKENS_PER_PROGRAM = {
    "norm": (1, 2, 4, 8),
    "norm_8bit": (1, 2, 4, 8),
    "final_layer": (16, 32),
    "euler": (16, 32, 64),
}


def search(context: Context) -> dict[str, dict[str, Any]]:
    """Time every launch of every kernel, and leave the fastest in place.

    Returns:
        By kernel, its launch, the GB/s of its cases with it, and why others were passed over.
    """
    launches = device_of(context.device).launches
    by_kernel: dict[str, list[Case]] = {}
    for case in cases(context, 40 if context.smoke else TOKENS):
        by_kernel.setdefault(case.kernel, []).append(case)
    found = {}
    for kernel, some in by_kernel.items():
        default = launches[kernel]
        times: dict[Launch, float] = {}
        skipped = {}
        for launch in candidates(kernel):
            launches[kernel] = launch
            try:
                with built_kernels() as built:
                    times[launch] = sum(_ms(context, case) for case in some)
                if spilled := sum(kernel.n_spills for kernel in built):
                    del times[launch]
                    skipped[str(launch)] = f"{spilled} spilled registers"
            except Exception as error:  # too many registers for so many warps, say
                skipped[str(launch)] = first_line(error)
        best = launches[kernel] = min(times, key=times.__getitem__, default=default)
        rates = {case.what: round(case.nbytes / _ms(context, case) / 1e6) for case in some}
        found[kernel] = {"launch": asdict(best), "gb_per_s": rates, "skipped": skipped}
        print(f"{kernel}: {best}, {rates}; skipped: {skipped}", file=sys.stderr, flush=True)
    return found


@contextmanager
def built_kernels() -> Iterator[list[Any]]:
    """The compiled kernels that are launched meanwhile; none in Triton's interpreter."""
    launched: list[Any] = []
    run = JITFunction.run

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = run(self, *args, **kwargs)
        if kernel is not None and all(kernel is not known for known in launched):
            launched.append(kernel)
        return kernel

    with patch.object(JITFunction, "run", recorded):
        yield launched


def candidates(kernel: str) -> list[Launch]:
    """Launches to try."""
    tokens = TOKENS_PER_PROGRAM.get(kernel, (DEFAULTS[kernel].tokens,))
    return [Launch(warps, count) for warps in WARPS for count in tokens]


def store(found: dict[str, dict[str, Any]], file: Path, device: str) -> None:
    """Write what a search has found."""
    values = {
        "device": device,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "launches": {kernel: entry["launch"] for kernel, entry in found.items()},
        "gb_per_s": {kernel: entry["gb_per_s"] for kernel, entry in found.items()},
        "skipped": {kernel: entry["skipped"] for kernel, entry in found.items()},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=1) + "\n")


def _ms(context: Context, case: Case) -> float:
    return queued(case.call, context.device, 2 if context.smoke else 20, 0.05).median


def main(argv: list[str] | None = None) -> int:
    """Search, and store in ``--output``."""
    parser = benchmark_parser("krea2_bench.tune_kernels", __doc__)
    parser.set_defaults(output=FOLDER)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU")
    name = torch.cuda.get_device_name()
    with torch.inference_mode():
        device = torch.device("cuda", torch.cuda.current_device())
        found = search(Context(device, smoke=False))
    store(found, args.output / config_file(name).name, name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
