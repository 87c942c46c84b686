"""The playground: one page in plain HTML, CSS and JavaScript modules, served as it lies here."""

from pathlib import Path

_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


def playground_files() -> dict[str, tuple[bytes, str]]:
    """Path of the URL -> content and media type: the page is "/", the rest is in "/playground/".

    The page names everything relative to itself, so it also works below a proxy's prefix.

    Raises:
        OSError: a file cannot be read.
    """
    files = {}
    for file in sorted(Path(__file__).parent.iterdir()):
        if media_type := _MEDIA_TYPES.get(file.suffix):
            path = "/" if file.name == "index.html" else f"/playground/{file.name}"
            files[path] = (file.read_bytes(), media_type)
    return files
