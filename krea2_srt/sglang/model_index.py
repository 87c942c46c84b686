"""What SGLang asks the model hub before it knows which pipeline serves."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from krea2_srt.cli.errors import USAGE_ERROR
from krea2_srt.model.json_files import read_json
from krea2_srt.model.releases import CLASS_NAME
from krea2_srt.sglang.commands import GENERATE, SERVE, is_command
from krea2_srt.sglang.parts import is_krea2_on_disk
from krea2_srt.sglang.served import is_krea2

_INDEX_OF_A_FILE = {"_class_name": CLASS_NAME, "_diffusers_version": "0.0.0"}
"""As much as SGLang reads of one."""


def read(original: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Any:
    """An AROUND hook of ``maybe_download_model_index``, for Krea 2.

    A single file has no index, and of a folder SGLang demands all parts, though some may be given
    apart: who loads them checks what is there. Where the hub refuses a repo, as it does without a
    licence that was accepted, SGLang goes on with another implementation and ends far from the
    reason. This ends the process in a line.
    """
    if is_krea2_on_disk(name):
        index = Path(name) / "model_index.json"
        return read_json(index) if Path(name).is_dir() else _INDEX_OF_A_FILE
    try:
        return original(name, *args, **kwargs)
    except Exception as error:
        a_path = name.startswith(("/", ".", "~"))
        if a_path and not os.path.exists(name) and is_command(GENERATE, SERVE):
            _end(f"{name} does not exist")
        if not _is_repo(name):
            raise
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

        from krea2_srt.model.downloads import hub_failure

        said = (HfHubHTTPError, EntryNotFoundError, HFValidationError)
        reasons = [reason for reason in _chain(error) if isinstance(reason, said)]
        if not reasons:
            raise
        _end(hub_failure(name, reasons[-1]))


def _end(why: str) -> NoReturn:
    print(f"krea2-srt: error: {why}", file=sys.stderr)
    raise SystemExit(USAGE_ERROR) from None


def end_if_refused(name: str) -> None:
    """Ask the hub for a repo of Krea 2; the process ends where it refuses. Not for other names."""
    from sglang.multimodal_gen.runtime.utils import hf_diffusers_utils

    if _is_repo(name):
        # Whatever is no refusal is told where SGLang meets it.
        with contextlib.suppress(Exception):
            hf_diffusers_utils.maybe_download_model_index(name)


def _is_repo(name: str) -> bool:
    return is_krea2(name) and not os.path.exists(name)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what led to it."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__
