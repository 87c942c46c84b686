"""One scheduler process of our images server: `python -m krea2_srt.sglang.worker`.

SGLang's own launcher imports everything once more, only to start the process that this is, and
ends all replicas with one. The images server starts one of these for each replica instead, and a
dead one anew.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from krea2_srt.cli.errors import one_line_errors
from krea2_srt.errors import ConfigError, first_line
from krea2_srt.sglang.early_reading import begin_for
from krea2_srt.sglang.served import SWITCH, WORKER_NAME, enabled


class ReadyPipe:
    """Takes SGLang's word that the model is loaded to whoever started us.

    Args:
        descriptor: of the pipe's write end.
        endpoint: where the scheduler listens.
    """

    def __init__(self, descriptor: int, endpoint: str) -> None:
        self._descriptor = descriptor
        self._endpoint = endpoint

    def send(self, message: dict[str, Any]) -> None:
        """Called by SGLang, as a `multiprocessing.connection.Connection`."""
        line = json.dumps({**message, "endpoint": self._endpoint})
        with os.fdopen(self._descriptor, "w") as pipe:
            pipe.write(line + "\n")


def check_served_by_us(server_args: Any) -> None:
    """Check that SGLang will run our pipeline: no other understands the images server.

    Raises:
        ConfigError: it will not, and why.
    """
    from sglang.multimodal_gen.configs.pipeline_configs.krea2 import Krea2PipelineConfig

    from krea2_srt.sglang.options import unsupported_options

    if not enabled():
        raise ConfigError(f"{SWITCH} is off, but the images server needs our own runner")
    if not isinstance(server_args.pipeline_config, Krea2PipelineConfig):
        raise ConfigError(f"{server_args.model_path} is not a Krea 2 model")
    if options := unsupported_options(server_args):
        raise ConfigError(f"not supported yet: {', '.join(options)}")


def _server_args(prepare: Callable[[Sequence[str]], Any], options: Sequence[str]) -> Any:
    try:
        return prepare(options)
    except ValueError as error:
        # Such as of a model that is not there: to start again would not help.
        raise ConfigError(first_line(error)) from None


def main(argv: Sequence[str] | None = None) -> None:
    """Load the model and run the scheduler until SIGTERM.

    Args:
        argv: ``--ready-fd N --parent-pid N``, and then SGLang's own options.
    """
    parser = argparse.ArgumentParser(prog="krea2_srt.sglang.worker", allow_abbrev=False)
    parser.add_argument("--ready-fd", type=int, required=True, help="told when we are ready")
    parser.add_argument("--parent-pid", type=int, required=True, help="ends us by its own end")
    ours, sglang_options = parser.parse_known_args(argv)
    begin_for(sglang_options)
    # Ctrl-C in a terminal is for the images server, which then tells us. No session of our own:
    # Linux shares the CPUs among sessions first, and the server would starve beside a busy engine
    # (waits of 7 s were seen on two cores).
    os.setpgid(0, 0)
    # Our plugin registers for a worker's needs, and SGLang names its processes in the log.
    multiprocessing.current_process().name = WORKER_NAME
    # Before the engine runs there is nothing to finish.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

    # In the order of SGLang's own bootstrap: platform, plugins, options, and then the runtime.
    from sglang.multimodal_gen.runtime.utils.process import (
        defer_full_gc_for_imports,
        kill_itself_when_parent_died,
    )

    kill_itself_when_parent_died()
    if os.getppid() != ours.parent_pid:
        return  # it had died before that
    with defer_full_gc_for_imports():
        from sglang.multimodal_gen.runtime.platforms import initialize_current_platform

        initialize_current_platform()
        from sglang.multimodal_gen.runtime.platforms.plugins import (
            apply_plugin_hooks,
            load_plugins,
        )

        load_plugins()
        apply_plugin_hooks()
        from sglang.multimodal_gen.runtime.server_args import prepare_server_args

        from krea2_srt.sglang.options import mark_as_server

        with one_line_errors("krea2-srt"):
            server_args = _server_args(prepare_server_args, sglang_options)
            check_served_by_us(server_args)
            mark_as_server(server_args)
        from sglang.multimodal_gen.runtime.managers import gpu_worker

    pipe: Any = ReadyPipe(ours.ready_fd, server_args.scheduler_endpoint)
    gpu_worker.run_scheduler_process(
        local_rank=0, rank=0, server_args=server_args, pipe_writer=pipe
    )


if __name__ == "__main__":
    main()
