"""What is done before SGLang starts its workers."""

from collections.abc import Callable
from typing import Any

from krea2_srt.sglang import model_index
from krea2_srt.sglang.commands import workers_that_say_why
from krea2_srt.sglang.served import serves_krea2
from krea2_srt.threads import limit_spinning


def launch(original: Callable[..., Any], server_args: Any, *args: Any, **kwargs: Any) -> Any:
    """An AROUND hook of ``launch_server``; leaves SGLang alone when it serves another model.

    What is set in the environment, workers inherit. SGLang reads its arguments before it knows of
    plugins, and where the hub refused a repo of Krea 2 then, it went on with another
    implementation: the hub is asked again, so that the process ends with the reason, in a line.
    """
    if not serves_krea2(server_args):
        model_index.end_if_refused(server_args.model_path)
        return original(server_args, *args, **kwargs)
    limit_spinning()
    with workers_that_say_why():
        return original(server_args, *args, **kwargs)
