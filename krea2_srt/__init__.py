"""krea2-srt: serve the text-to-image model Krea 2 from your own GPUs."""

__version__ = "0.1.0"
