"""The search of the kernels' launches: a part before all others, where it is asked for."""

from pathlib import Path

import torch

from krea2_bench.gpu.budget import PartPlan
from krea2_bench.gpu.context import Context

PLAN = PartPlan("tune", "kernels", seconds=90.0, deadline_s=240.0)
"""Ten kernels with up to 16 launches each, most of which are built for it."""


def run(context: Context, output: Path) -> None:
    """Search, and write what was found beside the results; nothing unless this is a GPU."""
    from krea2_bench import tune_kernels
    from krea2_srt.kernels.launch import config_file

    if not context.on_gpu:
        raise RuntimeError(f"launches are searched on a GPU, not on {context.device}")
    name = torch.cuda.get_device_name(context.device)
    found = tune_kernels.search(context)
    tune_kernels.store(found, output / config_file(name).name, name)
