"""Measure the model on a GPU: kernels, attention, steps, VAE, text encoder and whole pictures.

For a GPU that is there for minutes: the most valuable first, every row on the disk as soon as it is
measured, and every part in a child that can crash or hang without harm to the others. Needs torch,
triton, transformers and safetensors, and no network. Figures are shares of what is possible.
"""

import os
import sys
import time
from pathlib import Path

STARTED = time.monotonic()


def main(argv: list[str] | None = None, started: float | None = None) -> int:
    """Run the parts; returns 1 if something failed.

    Args:
        argv: the command line.
        started: when the budget began, on the machine's own clock; now unless told.
    """
    from krea2_bench.gpu import command

    return command.main(__doc__, argv, started)


if __name__ == "__main__":
    # Uninstalled, where the packages are.
    sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]
    # Before torch is loaded. A fork of a process with threads may wait for ever for one that it
    # has not got.
    for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[_name] = "1"
    # Where something asks whether there is a GPU, CUDA must not be what answers.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    sys.exit(main(started=STARTED))
