"""Whether krea2-srt serves: by its switch, and by what SGLang is asked to serve.

Without SGLang at import: every process that looks for plugins comes here.
"""

import os
from typing import Any

SWITCH = "KREA2_SRT"
"""Environment variable; ``off`` leaves SGLang's own Krea 2 in place."""

WORKER_NAME = "sglang-diffusionWorker"
"""How SGLang's scheduler processes are called."""


def enabled() -> bool:
    return os.environ.get(SWITCH, "on").strip().lower() not in ("off", "0", "false", "no")


def is_krea2(name: str) -> bool:
    """Whether a model path or a pipeline's class name, as SGLang probes both, is Krea 2's.

    Of a path only the last part counts, or the hub cache's: a folder above may be called anything
    ("krea2-srt/models/my-flux"). A checkpoint in a folder of any name is known by its class name.
    """
    name = name.lower().rstrip("/")
    return (
        name == "krea2pipeline"
        or "krea-2" in name.rsplit("/", 1)[-1]
        or "models--krea--krea-2" in name
    )


def serves_krea2(server_args: Any) -> bool:
    """Whether SGLang has read its arguments as those of a Krea 2 model."""
    from sglang.multimodal_gen.configs.pipeline_configs.krea2 import Krea2PipelineConfig

    return isinstance(getattr(server_args, "pipeline_config", None), Krea2PipelineConfig)
