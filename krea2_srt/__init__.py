"""krea2-srt: serve the text-to-image model Krea 2 from your own GPUs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from krea2_srt.offline import GenerationCancelled, ImageProgress, Krea2

__version__ = "0.1.0"
__all__ = ["GenerationCancelled", "ImageProgress", "Krea2", "__version__"]


def __getattr__(name: str) -> Any:
    # What needs no torch should not wait for it: the server, the command lines, SGLang's own.
    if name in __all__:
        from krea2_srt import offline

        return getattr(offline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
