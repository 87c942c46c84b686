"""What is done before SGLang starts its workers."""

import contextlib
import os
from collections.abc import Callable
from typing import Any

from krea2_srt.plugin import is_krea2
from krea2_srt.threads import limit_spinning


def launch(original: Callable[..., Any], server_args: Any, *args: Any, **kwargs: Any) -> Any:
    """An AROUND hook of ``launch_server``; leaves SGLang alone when it serves another model.

    What is set in the environment, workers inherit. SGLang reads its arguments before it knows of
    plugins, and where the hub refused a repo of Krea 2 then, it went on with another
    implementation: the hub is asked again, so that the process ends with the reason, in a line.
    """
    from sglang.multimodal_gen.configs.pipeline_configs.krea2 import Krea2PipelineConfig
    from sglang.multimodal_gen.runtime.utils import hf_diffusers_utils

    path = server_args.model_path
    if isinstance(getattr(server_args, "pipeline_config", None), Krea2PipelineConfig):
        limit_spinning()
    elif is_krea2(path) and not os.path.exists(path):
        # Whatever is no refusal is told where SGLang meets it.
        with contextlib.suppress(Exception):
            hf_diffusers_utils.maybe_download_model_index(path)
    return original(server_args, *args, **kwargs)
