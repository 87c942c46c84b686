"""What is done before SGLang starts its workers."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from krea2_srt.errors import CheckpointError, ConfigError
from krea2_srt.model.parts import check_on_disk
from krea2_srt.model.releases import CLASS_NAME
from krea2_srt.sglang import model_index
from krea2_srt.sglang.commands import (
    GENERATE,
    SERVE,
    ending_in_a_line,
    is_command,
    workers_that_say_why,
)
from krea2_srt.sglang.compat import explicit_options
from krea2_srt.sglang.parts import is_krea2_on_disk, refuse_single_files, source_of
from krea2_srt.sglang.served import serves_krea2
from krea2_srt.threads import limit_spinning


def launch(original: Callable[..., Any], server_args: Any, *args: Any, **kwargs: Any) -> Any:
    """An AROUND hook of ``launch_server``; leaves SGLang alone when it serves another model.

    What is set in the environment, workers inherit. SGLang reads its arguments before it knows of
    plugins, and where the hub refused a repo of Krea 2 then, it went on with another
    implementation: the hub is asked again, so that the process ends with the reason, in a line.
    """
    command = is_command(GENERATE, SERVE)
    with ending_in_a_line(CheckpointError, ConfigError) if command else nullcontext():
        check(server_args)
    if not serves_krea2(server_args):
        model_index.end_if_refused(server_args.model_path)
        return original(server_args, *args, **kwargs)
    limit_spinning()
    with workers_that_say_why():
        return original(server_args, *args, **kwargs)


def check(server_args: Any) -> None:
    """Check what can be told before a worker is started.

    Raises:
        CheckpointError: something that is named is not there, or SGLang, which did not know that
            it is Krea 2's, would go on with its Diffusers back end.
        ConfigError: an option or a setting is wrong.
    """
    path = server_args.model_path
    if serves_krea2(server_args):
        # It imports SGLang, which does so with plugins.
        from krea2_srt.sglang.options import check_quantization_of_sglang, unsupported_options

        if options := unsupported_options(server_args):
            refuse_single_files(path, server_args, options)
            check_quantization_of_sglang(server_args, options)
        elif not server_args.model_subfolder:
            check_on_disk(source_of(path, server_args))
    elif "backend" not in explicit_options(server_args) and is_krea2_on_disk(path):
        raise CheckpointError(
            f"{path}: SGLang serves a single file, or a folder without some of its parts, only "
            f"with --pipeline-class-name {CLASS_NAME}"
        )
