"""A command as the image runs it; see restricted.sh."""

import sys
from pathlib import Path

from tests.programs import required, required_root


def restricted(ids: str, model: Path, cache: Path | None = None) -> list[str]:
    """What runs a command so; it needs root.

    Args:
        ids: USER:GROUP, in numbers.
        model: a folder that is then /srv/model.
        cache: what is then /srv/cache, the working folder; None is a new one.
    """
    required_root()
    python = Path(sys.base_prefix)
    script = Path(__file__).with_name("restricted.sh")
    wrapper = [required("unshare"), "--mount", str(script), ids, str(cache or ""), str(model)]
    return [*wrapper, str(python), _hidden(python)]


def _hidden(folder: Path) -> str:
    """What keeps other users from a folder; nothing where nothing does."""
    for parent in reversed((folder, *folder.parents)):
        if not parent.stat().st_mode & 0o001:
            return str(parent)
    return ""
