"""What was measured on, and with what; asked in a child, since only children touch the GPU."""

import platform
import shutil
import subprocess
from contextlib import suppress
from typing import Any

import torch


def machine(device: torch.device) -> dict[str, Any]:
    """Names and versions, all of which can change a figure."""
    import triton

    found: dict[str, Any] = {
        "device": "CPU, a trial",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "memory": f"{properties.total_memory / 2**30:.1f} GiB",
            "L2 cache": f"{properties.L2_cache_size / 2**20:.0f} MiB",
            "CUDA": torch.version.cuda,
            "driver": _driver(),
            "cuDNN": torch.backends.cudnn.version(),
            "cuDNN attention": "on" if torch.backends.cuda.cudnn_sdp_enabled() else "off",
            "C compiler": _compiler(),
        }
    return found


def _driver() -> str:
    return _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])


def _compiler() -> str:
    """The one that Triton builds its launchers with."""
    for name in ("gcc", "clang"):
        if shutil.which(name):
            return _first_line([name, "--version"])
    return "none"


def _first_line(command: list[str]) -> str:
    with suppress(OSError, subprocess.SubprocessError, IndexError):
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return found.stdout.splitlines()[0].strip()
    return "unknown"
