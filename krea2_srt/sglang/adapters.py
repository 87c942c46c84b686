"""SGLang's options for an adapter, as what is merged while our runner loads the weights."""

import logging
from pathlib import Path

from sglang.multimodal_gen.runtime.server_args import ServerArgs
from sglang.multimodal_gen.runtime.utils.hf_diffusers_utils import maybe_download_lora

from krea2_srt.errors import AdapterError, RequestError, first_line
from krea2_srt.lora.scaled_files import ScaledFile
from krea2_srt.request import MAX_ADAPTER_SCALE, check_number
from krea2_srt.sglang.commands import USERS, text_of

logger = logging.getLogger(__name__)


def adapters_of(server_args: ServerArgs) -> tuple[ScaledFile, ...]:
    """The adapter of ``--lora-path`` and the options beside it; downloads it where it is a repo.

    Raises:
        AdapterError: there is none, it cannot be downloaded, or its scale cannot be.
    """
    if not server_args.lora_path:
        return ()
    try:
        check_number("--lora-scale", server_args.lora_scale, -MAX_ADAPTER_SCALE, MAX_ADAPTER_SCALE)
    except RequestError as error:
        raise AdapterError(str(error)) from None
    try:
        # Of a folder or repo it finds the file that is meant.
        path = maybe_download_lora(server_args.lora_path, weight_name=server_args.lora_weight_name)
    except Exception as error:  # a hub that cannot be reached has errors of its client's library
        logger.debug("krea2-srt: no adapter", exc_info=True)
        text = text_of(error) if isinstance(error, USERS) else first_line(error)
        raise AdapterError(f"--lora-path: {text}") from None
    if server_args.lora_merge_mode == "dynamic":
        logger.warning("krea2-srt: --lora-merge-mode dynamic: the adapter is merged all the same")
    return (ScaledFile(Path(path), server_args.lora_scale, server_args.lora_alpha),)
