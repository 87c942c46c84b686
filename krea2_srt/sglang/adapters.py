"""SGLang's options for an adapter, as what is merged while our runner loads the weights."""

from pathlib import Path

from sglang.multimodal_gen.runtime.server_args import ServerArgs
from sglang.multimodal_gen.runtime.utils.hf_diffusers_utils import maybe_download_lora

from krea2_srt.errors import AdapterError
from krea2_srt.lora.scaled_files import ScaledFile


def adapters_of(server_args: ServerArgs) -> tuple[ScaledFile, ...]:
    """The adapter of ``--lora-path`` and the options beside it; downloads it where it is a repo.

    Raises:
        AdapterError: there is none, or it cannot be downloaded.
    """
    if not server_args.lora_path:
        return ()
    path = Path(server_args.lora_path)
    if not path.is_file():
        try:
            # The file of a folder or repo that is meant, by SGLang's own rules.
            found = maybe_download_lora(
                server_args.lora_path, weight_name=server_args.lora_weight_name
            )
        except (ValueError, OSError) as error:
            text = str(error).strip() or type(error).__name__
            raise AdapterError(f"--lora-path: {text.splitlines()[0]}") from None
        path = Path(found)
    return (ScaledFile(path, server_args.lora_scale, server_args.lora_alpha),)
