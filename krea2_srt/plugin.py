"""The entry point that SGLang calls in every process. It registers our hooks.

Registered under the entry-point group ``sglang.multimodal_gen.plugins``.
"""

import logging
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

from krea2_srt.environment import read_environment
from krea2_srt.errors import ConfigError
from krea2_srt.sglang import compat
from krea2_srt.sglang.early_reading import begin_for_command
from krea2_srt.sglang.served import SWITCH, WORKER_NAME, enabled, is_krea2, serves_krea2

logger = logging.getLogger(__name__)

Hook = Callable[..., Any]
"""An AROUND hook: called with the original function and its arguments."""


def register() -> None:
    """Put our pipeline and scheduler in place of SGLang's for Krea 2 models."""
    if not enabled():
        logger.info("%s=%s: SGLang's own Krea 2 serves", SWITCH, os.environ[SWITCH])
        return

    try:
        read_environment()
    except ConfigError as error:
        # SGLang would log any other exception, and serve without us.
        raise SystemExit(f"krea2-srt: error: {error}") from None

    begin_for_command()
    # Not at module scope: with the switch off, and in every process that only looks for entry
    # points, these imports would cost seconds for nothing.
    from sglang.multimodal_gen import registry
    from sglang.multimodal_gen.configs.pipeline_configs.krea2 import Krea2PipelineConfig
    from sglang.multimodal_gen.configs.sample.krea2 import Krea2SamplingParams
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    from krea2_srt.sglang import model_index
    from krea2_srt.sglang.pipeline import Krea2RunnerPipeline
    from krea2_srt.sglang.scheduler import Krea2Scheduler

    registry.register_pipeline(
        Krea2RunnerPipeline,
        sampling_param_cls=Krea2SamplingParams,
        pipeline_config_cls=Krea2PipelineConfig,
        model_detectors=[is_krea2],
        overwrite=True,
    )
    HookRegistry.register(compat.SCHEDULER, Krea2Scheduler, HookType.REPLACE)
    HookRegistry.register(compat.MODEL_INDEX, model_index.read, HookType.AROUND)
    if not multiprocessing.current_process().name.startswith(WORKER_NAME):
        _register_http_hooks()


def _register_http_hooks() -> None:
    """For the process that clients talk to, or that is a command. A worker would import an HTTP
    server for them.
    """
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    from krea2_srt import disconnects
    from krea2_srt.sglang import commands, launch, shutdown

    hooks: dict[str, Hook] = {
        compat.CREATE_APP: _only_krea2(disconnects.add_to_app),
        compat.LAUNCH_HTTP: _only_krea2(shutdown.exit_on_sigterm),
        compat.LAUNCH: launch.launch,
    }
    if commands.is_command(commands.GENERATE):
        hooks[compat.GENERATE] = commands.generate
    for target, hook in hooks.items():
        HookRegistry.register(target, hook, HookType.AROUND)


def _only_krea2(hook: Hook) -> Hook:
    """A hook of a function of SGLang's arguments; it leaves another model alone."""

    def hooked(original: Callable[..., Any], server_args: Any, *args: Any, **kwargs: Any) -> Any:
        if not serves_krea2(server_args):
            return original(server_args, *args, **kwargs)
        return hook(original, server_args, *args, **kwargs)

    return hooked
