"""Reading of the weights begins while SGLang is being imported, from what its command line says."""

import argparse
import multiprocessing
import sys
from collections.abc import Sequence

from krea2_srt.model.on_disk import begin_to_read
from krea2_srt.sglang.commands import GENERATE, SERVE, is_command
from krea2_srt.sglang.served import WORKER_NAME

_PARTS = {
    "transformer_path": "transformer",
    "transformer_weights_path": "transformer",
    "text_encoder_path": "text_encoder",
    "vae_path": "vae",
}
"""SGLang's options that name a part, and ours."""


def begin_for(options: Sequence[str]) -> None:
    """Begin to read the checkpoint that options of SGLang's name, if it is here and a Krea 2.

    Args:
        options: of `sglang serve` or `generate`; those that name no file are SGLang's business.
    """
    # It prints nothing and ends nothing: what is wrong, SGLang says.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("model_path", "revision", *_PARTS):
        parser.add_argument(f"--{name.replace('_', '-')}", f"--{name}", dest=name)
    try:
        given = vars(parser.parse_known_args(options)[0])
    except argparse.ArgumentError:
        return
    model = given["model_path"]
    if model is None and options and not options[0].startswith("-"):
        model = options[0]
    if model:
        parts = {ours: given[theirs] for theirs, ours in _PARTS.items() if given[theirs]}
        begin_to_read(model, given["revision"], **parts)


def begin_for_command() -> None:
    """The same in a worker that `sglang serve` or `generate` has started; nothing elsewhere.

    Such a worker has the command's own arguments.
    """
    if multiprocessing.current_process().name.startswith(WORKER_NAME) and is_command(
        GENERATE, SERVE
    ):
        begin_for(sys.argv[2:])
