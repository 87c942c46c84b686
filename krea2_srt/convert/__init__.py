"""Checkpoints in another layout or precision, for good: what `krea2-convert` runs."""
